"""Benchmarks that run ecaray side by side with its peers: same files, same weights, same machine, same session."""
