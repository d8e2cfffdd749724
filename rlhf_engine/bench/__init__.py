"""Throughput benchmarks: what `rlhf bench` runs, and the timers, limits and processes that `benchmarks/` builds on."""
