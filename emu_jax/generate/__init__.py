"""From prompts that mix text and pictures to text, visual embeddings and candidates' scores."""
