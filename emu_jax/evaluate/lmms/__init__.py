"""Emu as a model of lmms-eval, `lmms-eval --model emu_jax`."""
