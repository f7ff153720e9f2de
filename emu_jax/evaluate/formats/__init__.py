"""Published file formats that several benchmarks share, and checked access to a benchmark's folder."""
