"""Parameters of a benchmark: a config with every question answered."""

from dataclasses import dataclass

import pyarrow as pa

from pipelines.config.benchmark import BenchmarkConfig
from pipelines.engine.engine import Engine
from pipelines.engine.options import PredictOptions
from pipelines.engine.plan import ComputePlan
from pipelines.engine.source import Tasks, plan_tasks, rows_per_file
from pipelines.inference.request import resolve_topk
from pipelines.inputs.reader import Reader
from pipelines.outputs.writer import PartWriter

# For a stage alone, whose every process is sent their URIs: on GPUs some seconds of the fastest.
MAX_STAGE_IMAGES = 20_000
# A run is mostly its start and its end below these.
MIN_IMAGES, MIN_WHOLE_S = 1_000, 60
# Processes that read from the store, and replicas that predict, at the same time while each is measured, at most.
MAX_READERS = MAX_REPLICAS = 32


@dataclass(frozen=True)
class Setup:
    """A benchmark, about to be run.

    Attributes:
        config: of the job.
        engine: with the model.
        num_cpus: of the machines.
        reader: of the input.
        sample: rows of the input that the reader can read; of the stages at first, then of the whole.
        writer: of the rows.
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
        return self.engine.options(resolve_topk(self.config, self.engine.facts), self.config.outputs.embedding)

    @property
    def tasks(self) -> Tasks:
        """Tasks of a run over `sample`."""
        commit_rows = self.config.output.commit_rows
        return plan_tasks(len(self.sample), self.plan.batch_size, self.plan.num_threads, commit_rows)

    @property
    def rows_per_file(self) -> int:
        """Rows of a file of a run over `sample`; files of the stages may be larger than those of the whole."""
        return rows_per_file(len(self.sample), self.tasks.num_rows, self.config.output.commit_rows)

    @property
    def num_replicas(self) -> int:
        """That predict at the same time: those of a machine share its memory's bandwidth."""
        return min(MAX_REPLICAS, self.plan.min_workers)

    @property
    def num_readers(self) -> int:
        """Processes that read from the store at the same time."""
        return max(1, min(MAX_READERS, int(self.num_cpus)))


def num_stage_images(config: BenchmarkConfig) -> int:
    """Images that the stages are measured with, at most."""
    return min(MAX_STAGE_IMAGES, config.sample.num_images or MAX_STAGE_IMAGES)


def num_whole_images(config: BenchmarkConfig, ceiling_images_per_s: float) -> int:
    """Images that the whole is measured with, at most."""
    return config.sample.num_images or max(MIN_IMAGES, int(MIN_WHOLE_S * ceiling_images_per_s))
