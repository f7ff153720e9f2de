"""The kinds of run, one file each."""
