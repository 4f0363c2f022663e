"""Training runs, their estimates and benchmarks."""
