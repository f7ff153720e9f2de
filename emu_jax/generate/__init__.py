"""From prompts that mix text and images to text, visual embeddings and candidates' scores."""
