"""Benchmarks behind `dra bench`: ratios measured in one run."""
