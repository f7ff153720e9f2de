"""Scores: one file a family of benchmarks, and the report."""
