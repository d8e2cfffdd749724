"""Short programs that use the library; run one from the repository's root with `python -m benchmarks.examples.NAME`."""
