"""Training: `run.py` is the trainer, `loop.py` what each worker runs, one module a concern beside them.

labelled (what) -> order (which, when) -> augment (pixels) -> batches (a share) -> ingest (to the workers) -> learner
"""
