"""Comparison of every function of our adapters with its original: `python -m benchmarks.peer_agreement`."""
