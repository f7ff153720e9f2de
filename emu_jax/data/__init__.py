"""From records to packed rows: documents, tokenizer, packing, sources and the Grain pipeline."""
