"""Prompts that mix text and images -> text, visual embeddings, images and candidate scores."""
