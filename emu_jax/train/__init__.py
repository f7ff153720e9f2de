"""Training: mesh, optimizer, state, step, loop, checkpoints."""
