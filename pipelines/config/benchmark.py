"""The request of `jobs.benchmark`."""

from pydantic import Field

from pipelines.config.base import Section
from pipelines.config.infer import InferConfig


class BenchmarkSampleConfig(Section):
    """What is measured with."""

    num_images: int | None = Field(default=None, ge=1)
    """Images of the input, spread evenly over it, that the end-to-end run labels. Default: as many as take a minute at
    the lowest ceiling, at least 1,000, or all there are."""

    stage_s: float = Field(default=5.0, gt=0)
    """How long each stage is measured alone, in seconds, after a warm-up of its own, before and after the whole.
    Default: 5."""


class BenchmarkConfig(InferConfig):
    """Measure the ceiling of each stage of infer, the rate of the whole, and which stage binds."""

    sample: BenchmarkSampleConfig = BenchmarkSampleConfig()
