"""Side-by-side runs against peers: same files, same weights, same machine, one run."""
