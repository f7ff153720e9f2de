"""Published weights in, ours out: one file a foreign format. Only this package reads PyTorch files."""
