"""Short programs that use the library; each runs from the repository's root, `python -m benchmarks.examples.NAME`."""
