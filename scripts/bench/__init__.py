"""The parts of `scripts/benchmark.py`, and how they are timed."""
