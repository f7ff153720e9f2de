"""Scores of predictions, each as its benchmark's own evaluation takes them."""
