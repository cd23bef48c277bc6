"""A replica in a Ray actor, as the driver describes it. Imports no torch: drivers need none."""

import pickle
from dataclasses import dataclass

import pyarrow as pa
import ray

from pipelines.runtime.garbage_collector import paused_gc


@dataclass(frozen=True)
class PredictOptions:
    """How a replica runs.

    Attributes:
        batch_size: images per forward pass; fewer are padded to it.
        topk: classes kept per image; 0 for none.
        embedding: whether the pooled features are kept.
        use_gpu: run on the GPU that Ray gave this process, else on the CPU.
        num_threads: on the CPU; of one batch each, or all of one batch where the model is quantized.
        compile: whether `torch.compile` takes the model, for the one shape that all batches have.
        max_pixels: largest image that a replica decodes; None where images come decoded.
    """

    batch_size: int
    topk: int
    embedding: bool
    use_gpu: bool
    num_threads: int = 1
    compile: bool = False
    max_pixels: int | None = None


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
