"""Engine of a job: its model, its compute plan and the stages that all jobs share.

`infer`, `evaluate` and `benchmark` share it. A job creates its engine first, so that a request that does not fit this
machine is refused before any input is read. The model is prepared while Ray starts; only `plan` and `stream` need Ray.
"""

import functools
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
from pipelines.engine.quantization_sample import evenly_spaced, read_sample, refuse_unsupported_int8
from pipelines.engine.source import Source
from pipelines.inputs.reader import Reader
from pipelines.models.bundle import ModelFacts
from pipelines.models.process import ModelProcess
from pipelines.outputs.columns import ModelColumns
from pipelines.runtime.nodes import this_machine
from pipelines.runtime.ray_session import is_cluster_named

if TYPE_CHECKING:
    import ray.data


class Engine:
    """Engine that fetches, decodes and predicts.

    Args:
        config: Config of the job.
        process: Process that is resolving the model.

    Attributes:
        is_quantized: True if the job has to call `quantize` with images of the input.

    Raises:
        RequestError: The request does not fit this machine.
    """

    def __init__(self, config: EngineConfig, process: ModelProcess) -> None:
        self._config, self._process = config, process
        self.is_quantized = config.model.dtype == "int8"
        self._quantized: ModelFacts | None = None
        # The plan for a named cluster has to wait until Ray has connected to it.
        self._plan = None if is_cluster_named() else plan_compute(config.compute, [this_machine()], self.is_quantized)
        if self.is_quantized:
            refuse_unsupported_int8(config.compute.use_gpu, is_cluster_named())

    @property
    def facts(self) -> ModelFacts:
        """Facts about the model, without its weights. For int8, the facts of the float32 model until `quantize` ran.

        Raises:
            RequestError: The weights cannot be loaded, or do not fit the model or the image size.
        """
        return self._quantized or self._process.facts()

    def sample_positions(self, num_rows: int) -> NDArray[np.int64]:
        """Return the positions of the rows to quantize with, evenly spaced over `num_rows` rows."""
        return evenly_spaced(num_rows, self._config.model.quantization.num_images)

    def quantize(self, rows: pa.Table, reader: Reader, is_pinned: bool = False) -> list[int]:
        """Quantize the model on images of the input.

        Args:
            rows: Table with `id`, `uri` and the locators of the reader.
            reader: Reader of the images.
            is_pinned: True if an earlier run quantized with exactly these images, so that none may be missing.

        Returns:
            Ids of the images that could be read.

        Raises:
            RequestError: No image, or not every pinned image, can be read, or int8 is too far from float32.
        """
        images, ids = read_sample(rows, self.decode(reader), is_pinned)
        self._quantized = self._process.quantized_facts(images)
        return ids

    def decode(self, reader: Reader) -> FetchAndDecode:
        """Return the fetch and decode stage for inputs that `reader` listed."""
        return make_decode(self._config, self.facts.transform, reader)

    @functools.cached_property
    def plan(self) -> ComputePlan:
        """Resources that each stage declares to Ray. Waits for the autoscaler if the cluster has to scale up first.

        Raises:
            RequestError: The request does not fit the cluster.
        """
        return self._plan or plan_for_cluster(self._config.compute, self.is_quantized)

    def options(self, columns: tuple[ModelColumns, ...]) -> PredictOptions:
        """Return the options of replicas that compute these columns."""
        return PredictOptions(
            batch_size=self.plan.batch_size,
            columns=columns,
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
        """Run the pipeline over a source whose images `reader` reads.

        The other arguments and the rows are those of `pipelines.engine.chain.stream`.
        """
        from pipelines.engine.chain import stream  # late: Ray Data takes half a second to import

        return stream(source, self.decode(reader), self._process.pickled_bundle(), options, self.plan, finish)

    def pickled_bundle(self) -> bytes:
        """Return the pickled `ModelBundle` for the replicas.

        Raises:
            RunError: The process that resolves the model died.
        """
        return self._process.pickled_bundle()

    def describe(self, num_images: int) -> str:
        """Return one log line that summarizes the run."""
        plan = self.plan
        device = "1 GPU" if plan.num_gpus_per_worker else f"{plan.num_threads_per_worker} CPU threads"
        height, width = self.facts.transform.input_size
        replicas = "replica" if plan.num_workers == 1 else "replicas"
        return (
            f"{num_images:,} images for {self.facts.name} at {height} x {width}; "
            f"{plan.num_workers} {replicas} with {device} each, batch size {plan.batch_size}"
        )
