"""The request of `jobs.benchmark`."""

from pydantic import Field

from pipelines.config.base import Section
from pipelines.config.infer import InferConfig

# Half a minute of two cores, and ten seconds of a GPU.
NUM_IMAGES_ON_CPUS, NUM_IMAGES_ON_GPUS = 1_000, 100_000


class BenchmarkSampleConfig(Section):
    """What is measured with."""

    num_images: int | None = Field(default=None, ge=1)
    """Images of the input, spread evenly over it, that the end-to-end run labels. Default: 1,000 on CPUs and 100,000
    with `compute.use_gpu`, or all there are."""

    stage_s: float = Field(default=5.0, gt=0)
    """How long each stage is measured alone, in seconds, after a warm-up of its own. Default: 5."""


class BenchmarkConfig(InferConfig):
    """Measure the ceiling of each stage of infer, the rate of the whole, and which stage binds."""

    sample: BenchmarkSampleConfig = BenchmarkSampleConfig()

    def num_sampled(self) -> int:
        """Images to label, at most."""
        return self.sample.num_images or (NUM_IMAGES_ON_GPUS if self.compute.use_gpu else NUM_IMAGES_ON_CPUS)
