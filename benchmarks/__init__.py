"""Benchmarks: one `bench_<op>.py` per op; each compares the op with a lower bound and with its peers in one run."""
