"""Emu (Generative Pretraining in Multimodality) in JAX."""
