"""The job `benchmark`: ceilings of the separate stages, and the rate of the whole pipeline."""
