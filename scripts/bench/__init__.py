"""The suites of `scripts/benchmark.py`, their page and their figures."""
