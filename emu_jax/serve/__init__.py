"""A model behind a web page and an HTTP API in one process, with continuous batching of requests."""
