"""Replica of the model in a Ray actor. Imports torch only in the actor: drivers need none."""

import pickle

import pyarrow as pa
import ray

from pipelines.engine.options import PredictOptions
from pipelines.runtime.garbage_collector import paused_gc


class PredictorActor:
    """Takes the bundle out of the object store, where the driver put it once, and loads it once. Rows 1:1."""

    def __init__(self, pickled_bundle: "ray.ObjectRef[bytes]", options: PredictOptions) -> None:
        with paused_gc():
            from pipelines.engine.predict import Predictor

            bundle = pickle.loads(ray.get(pickled_bundle))  # noqa: S301 - our own driver's, never from a file
        self._predict = Predictor(bundle, options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`IMAGES` to `predictions_schema`."""
        return self._predict(batch)
