"""Exact oracles that tests, benchmarks and demonstrations measure dlcore against."""
