"""Resolved parameters of a benchmark."""

from dataclasses import dataclass

import pyarrow as pa

from pipelines.config.benchmark import BenchmarkConfig
from pipelines.engine.engine import Engine
from pipelines.engine.options import PredictOptions
from pipelines.engine.plan import ComputePlan
from pipelines.engine.source import Tasks, plan_tasks, rows_per_file
from pipelines.inference.request import resolve_outputs
from pipelines.inputs.reader import Reader
from pipelines.outputs.columns import chosen_columns
from pipelines.outputs.writer import PartWriter

# Every process of a stage receives the URIs of these images. On GPUs, the fastest stage takes some seconds for them.
MAX_STAGE_IMAGES = 20_000
# Shorter runs consist mostly of their start and end.
MIN_IMAGES, MIN_WHOLE_S = 1_000, 60
# Limits on the number of concurrent processes while the store and the replicas are measured.
MAX_READERS = MAX_REPLICAS = 32


@dataclass(frozen=True)
class Setup:
    """Resolved parameters of a benchmark.

    Attributes:
        config: Config of the job.
        engine: Engine with the model.
        num_cpus: CPUs of the cluster.
        reader: Reader of the input.
        sample: Rows of the input to measure with, first those for the stages, then those for the whole pipeline.
        writer: Writer of the rows.
    """

    config: BenchmarkConfig
    engine: Engine
    num_cpus: float
    reader: Reader
    sample: pa.Table
    writer: PartWriter

    @property
    def plan(self) -> ComputePlan:
        """Resources that each stage declares to Ray."""
        return self.engine.plan

    @property
    def options(self) -> PredictOptions:
        """Options of the replicas."""
        return self.engine.options(chosen_columns(resolve_outputs(self.config, self.engine.facts)))

    @property
    def tasks(self) -> Tasks:
        """Tasks of a run over `sample`."""
        commit_rows = self.config.output.commit_rows
        return plan_tasks(len(self.sample), self.plan.batch_size, self.plan.num_threads, commit_rows)

    @property
    def rows_per_file(self) -> int:
        """Number of rows per file in a run over `sample`. The stages may use larger files than the whole pipeline."""
        return rows_per_file(len(self.sample), self.tasks.num_rows, self.config.output.commit_rows)

    @property
    def num_replicas(self) -> int:
        """Number of replicas that are measured concurrently, because they share the memory bandwidth of a machine."""
        return min(MAX_REPLICAS, self.plan.min_workers)

    @property
    def num_readers(self) -> int:
        """Number of processes that read from the store concurrently."""
        return max(1, min(MAX_READERS, int(self.num_cpus)))


def num_stage_images(config: BenchmarkConfig) -> int:
    """Return the maximum number of images to measure the stages with."""
    return min(MAX_STAGE_IMAGES, config.sample.num_images or MAX_STAGE_IMAGES)


def num_whole_images(config: BenchmarkConfig, ceiling_images_per_s: float) -> int:
    """Return the maximum number of images to measure the whole pipeline with.

    Args:
        config: Config of the job.
        ceiling_images_per_s: Lowest ceiling of the stages.
    """
    return config.sample.num_images or max(MIN_IMAGES, int(MIN_WHOLE_S * ceiling_images_per_s))
