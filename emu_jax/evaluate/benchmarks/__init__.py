"""Benchmarks' published files: read as questions, and predictions written as their servers take them."""
