"""The fixed name of a command; the benchmark itself is `benchmarks.kernels`."""
