"""The request of `jobs.evaluate`."""

from pydantic import Field, model_validator

from pipelines.config.base import Section
from pipelines.config.sections import (
    MAX_BYTES,
    ComputeConfig,
    LabelledInputConfig,
    ModelConfig,
    PreprocessConfig,
    refuse_gpu_work_for_cpus,
)


class EvaluateInputConfig(LabelledInputConfig):
    """The labelled images to measure with."""

    max_bytes: int = Field(default=MAX_BYTES, gt=0)
    """Largest object fetched, in bytes; a larger one counts as failed. Default: 256 MiB."""


class EvaluateConfig(Section):
    """Measure top-1 and top-5 over a labelled set, every image counted once."""

    input: EvaluateInputConfig
    model: ModelConfig = ModelConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _gpu_work_has_gpus(self) -> "EvaluateConfig":
        refuse_gpu_work_for_cpus(self.model, self.preprocess, self.compute)
        return self
