"""Benchmarks: `make bench`. They print ratios against a floor measured in the same run, never a promise."""
