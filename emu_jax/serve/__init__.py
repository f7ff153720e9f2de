"""A model behind a page and an HTTP API, one process: requests that wait are computed together."""
