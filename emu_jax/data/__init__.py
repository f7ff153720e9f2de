"""From raw data to batches: readers, prepared folders, documents, tokenizer, packing and the Grain pipeline."""
