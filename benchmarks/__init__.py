"""Benchmarks of fastgen, one command per table of docs/benchmarks.md."""
