"""The engine of a job: its model, its compute plan and its first stage, prepared while Ray and other things start.

`infer`, `evaluate` and `benchmark` share it. A job makes one at its very start, so that a request that cannot be
scheduled on this machine is refused before anything is read. `plan` and `stream` need Ray.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.engine.autoscaling import plan_for_cluster
from pipelines.engine.config import EngineConfig
from pipelines.engine.fetch_decode import FetchAndDecode, make_decode
from pipelines.engine.options import PredictOptions
from pipelines.engine.plan import ComputePlan, plan_compute
from pipelines.engine.quantization_sample import every_nth, read_sample, refuse_if_unable
from pipelines.engine.source import Source
from pipelines.inputs.reader import Reader
from pipelines.models.bundle import ModelFacts
from pipelines.models.process import ModelProcess
from pipelines.runtime.nodes import this_machine
from pipelines.runtime.ray_session import is_cluster_named

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger(__name__)


class Engine:
    """Fetches, decodes and predicts.

    Args:
        config: of the job.
        process: that is resolving the model.

    Raises:
        RequestError: this machine cannot do what is asked for.
    """

    def __init__(self, config: EngineConfig, process: ModelProcess) -> None:
        self._config, self._process = config, process
        self._is_compiled = config.model.dtype == "int8"
        self._quantized: ModelFacts | None = None
        # A cluster is planned for once Ray has connected to it.
        self._plan = None if is_cluster_named() else plan_compute(config.compute, [this_machine()], self._is_compiled)
        if self._is_compiled:
            refuse_if_unable(config.compute.use_gpu, is_cluster_named())

    @property
    def facts(self) -> ModelFacts:
        """The model, without its weights; of a model in int8, what is known before it is quantized.

        Raises:
            RequestError: the weights cannot be had, or do not fit the model or the image size.
        """
        return self._quantized or self._process.facts()

    @property
    def is_quantized(self) -> bool:
        """Whether the model has to be quantized on images of the input, by `quantize`."""
        return self._is_compiled

    def sample_positions(self, num_rows: int) -> NDArray[np.int64]:
        """Return the positions of the rows to quantize with, spread evenly over `num_rows`."""
        return every_nth(num_rows, self._config.model.quantization.num_images)

    def quantize(self, rows: pa.Table, reader: Reader, is_pinned: bool = False) -> list[int]:
        """Quantize the model on images of the input; returns the ids of those that could be read.

        Args:
            rows: `id`, `uri` and the locators of the reader.
            reader: reads the images.
            is_pinned: an earlier run read all of them, and its rows follow from them.

        Raises:
            RequestError: none of the images can be read, or a pinned one cannot, or int8 is too far from float32.
        """
        images, ids = read_sample(rows, self.decode(reader), is_pinned)
        self._quantized = self._process.quantized_facts(images)
        return ids

    def decode(self, reader: Reader) -> FetchAndDecode:
        """Return the first stage, for inputs that `reader` listed."""
        return make_decode(self._config, self.facts.transform, reader)

    @functools.cached_property
    def plan(self) -> ComputePlan:
        """What each stage declares to Ray; waits for a cluster that has to grow first.

        Raises:
            RequestError: the cluster cannot do what is asked for.
        """
        return self._plan or plan_for_cluster(self._config.compute, self._is_compiled)

    def options(self, topk: int, embedding: bool) -> PredictOptions:
        """Return how the replicas predict.

        Args:
            topk: classes per row; 0 for none.
            embedding: whether rows hold the pooled features.
        """
        return PredictOptions(
            batch_size=self.plan.batch_size,
            topk=topk,
            embedding=embedding,
            use_gpu=self.plan.num_gpus_per_worker > 0,
            num_threads=self.plan.num_threads_per_worker,
            compile=self._config.model.compile,
            max_pixels=self._config.preprocess.max_pixels_on_device,
        )

    def stream(
        self,
        source: Source,
        reader: Reader,
        options: PredictOptions,
        finish: Callable[["ray.data.Dataset"], "ray.data.Dataset"],
    ) -> Iterator[dict[str, Any]]:
        """Run the chain over all of a source, which `reader` reads; the rest as for `pipelines.engine.chain.stream`."""
        from pipelines.engine.chain import stream  # Ray Data takes half a second to import

        return stream(source, self.decode(reader), self._process.pickled_bundle(), options, self.plan, finish)

    def pickled_bundle(self) -> bytes:
        """Return the model as replicas take it.

        Raises:
            RunError: the process that resolves it died.
        """
        return self._process.pickled_bundle()

    def describe(self, num_images: int) -> str:
        """Return one line about what is about to be done."""
        plan = self.plan
        where = "GPU" if plan.num_gpus_per_worker else f"{plan.num_threads_per_worker} CPU threads"
        height, width = self.facts.transform.input_size
        return (
            f"{num_images:,} images for {self.facts.name} at {height} x {width}; "
            f"replicas: {plan.num_workers}, on {where} each; batches of {plan.batch_size}"
        )
