"""Peers of the benchmarks: other packages, called as their documentation describes, and plain PyTorch."""
