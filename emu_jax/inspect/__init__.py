"""What a model, its weights and its data hold, shown before a run."""
