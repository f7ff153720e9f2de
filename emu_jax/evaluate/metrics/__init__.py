"""Scores of predictions, as the benchmarks' own evaluation programs compute them."""
