"""What is measured: a config with every question answered."""

from dataclasses import dataclass

import pyarrow as pa

from pipelines.config.benchmark import BenchmarkConfig
from pipelines.engine.chain import rows_per_file
from pipelines.engine.plan import ComputePlan
from pipelines.engine.replica import PredictOptions
from pipelines.engine.source import rows_per_task
from pipelines.inference.request import make_options, resolve_topk
from pipelines.models.bundle import ModelFacts
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
        facts: what the model is.
        pickled_bundle: the model.
        plan: what each stage declares to Ray.
        num_cpus: of the machines.
        sample: URIs of images of the input; of the stages at first, then of the whole.
        writer: of the rows.
    """

    config: BenchmarkConfig
    facts: ModelFacts
    pickled_bundle: bytes
    plan: ComputePlan
    num_cpus: float
    sample: pa.ChunkedArray
    writer: PartWriter

    @property
    def options(self) -> PredictOptions:
        """How the replicas predict."""
        return make_options(self.config, self.plan, resolve_topk(self.config, self.facts))

    @property
    def rows_per_task(self) -> int:
        """As in a run over `sample`."""
        plan = self.plan
        return rows_per_task(len(self.sample), plan.batch_size, plan.num_threads, self.config.output.commit_rows)

    @property
    def rows_per_file(self) -> int:
        """As in a run over `sample`; those of the stages may be larger than those of the whole."""
        return rows_per_file(len(self.sample), self.rows_per_task, self.config.output.commit_rows)

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
