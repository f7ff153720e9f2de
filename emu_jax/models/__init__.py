"""The networks: vision encoder, Causal Transformer, LLaMA, and Emu that composes them."""
