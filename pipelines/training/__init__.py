"""Training: one module a concern.

labelled (what) -> order (which, when) -> augment (pixels) -> batches (to the workers)
"""
