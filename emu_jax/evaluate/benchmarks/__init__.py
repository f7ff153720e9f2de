"""One file a benchmark: its reader, prompt, metrics and submission format. `registry.py` lists them."""
