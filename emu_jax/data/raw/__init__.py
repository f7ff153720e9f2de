"""Raw data of the five kinds that Emu was trained on, one reader each; `emu-jax prepare` makes records of them."""
