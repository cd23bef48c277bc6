"""Training: `run.py` drives Ray Train, `loop.py` runs in each worker, and every other module covers one concern.

Data path: sampler (ids) -> augment (pixels) -> batches (one local batch) -> ingest (to the workers) -> learner.
"""
