"""Raw data for `emu-jax prepare`: one reader per module in `readers/`, and beside it the file formats they share."""
