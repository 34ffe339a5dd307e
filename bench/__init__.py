"""Benchmarks: one group per op and shape, one row per provider. See README.md."""
