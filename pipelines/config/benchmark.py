"""Config of `jobs.benchmark`."""

from pydantic import Field

from pipelines.config.base import Section
from pipelines.config.infer import InferConfig


class BenchmarkSampleConfig(Section):
    """Sample of the input to measure with."""

    num_images: int | None = Field(default=None, ge=1)
    """Images of the input, spread evenly over it, that the whole chain labels. If not set: as many as take a minute at
    the lowest ceiling, at least 1,000, or all there are."""

    stage_s: float = Field(default=5.0, gt=0)
    """Duration of the measurement of each stage, in seconds, after its own warm-up; each stage is measured before and
    after the whole chain."""


class BenchmarkConfig(InferConfig):
    """Measure the ceiling of each stage of infer, the rate of the whole chain, and which stage limits it."""

    sample: BenchmarkSampleConfig = BenchmarkSampleConfig()
