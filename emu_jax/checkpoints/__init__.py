"""Weights: the store that runs write, what foreign files convert to, and the one loader of both."""
