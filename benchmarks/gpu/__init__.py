"""Parts of `benchmarks.compile_check` and `benchmarks.gpu_suite`."""
