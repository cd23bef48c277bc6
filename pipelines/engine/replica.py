"""Ray actor that holds a replica of the model. Only the actor imports torch; the driver does not need it."""

import pickle

import pyarrow as pa
import ray

from pipelines.engine.options import PredictOptions
from pipelines.runtime.garbage_collector import paused_gc


class PredictorActor:
    """Actor that loads the model bundle from the object store once and predicts with it. Rows map 1:1."""

    def __init__(self, bundle_ref: "ray.ObjectRef[bytes]", options: PredictOptions) -> None:
        with paused_gc():
            from pipelines.engine.predict import Predictor

            bundle = pickle.loads(ray.get(bundle_ref))  # noqa: S301 - pickled by our own driver, never read from a file
        self._predict = Predictor(bundle, options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Convert `IMAGES` to `predictions_schema`."""
        return self._predict(batch)
