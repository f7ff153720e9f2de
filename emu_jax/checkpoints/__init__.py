"""Weights: the store that runs write to, the conversion of foreign files, and the one loader of both (`load.py`)."""
