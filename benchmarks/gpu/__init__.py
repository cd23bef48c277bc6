"""Everything that needs a GPU, measured in one bounded run: `python -m benchmarks.gpu`."""
