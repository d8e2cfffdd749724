"""Benchmarks: one `bench_<op>.py` an op, each measured against its floor and its peers in one run."""
