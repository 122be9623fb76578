"""Benchmarks of xent_array; `python -m bench --help`, and README.md beside this file."""
