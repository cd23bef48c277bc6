"""Config of `jobs.evaluate`."""

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
    """Labelled images to evaluate on."""

    max_bytes: int = Field(default=MAX_BYTES, gt=0)
    """Largest object fetched, in bytes. A larger one counts as failed."""


class EvaluateConfig(Section):
    """Measure top-1 and top-5 accuracy on labelled images. Every image counts once."""

    input: EvaluateInputConfig
    model: ModelConfig = ModelConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _gpu_work_has_gpus(self) -> "EvaluateConfig":
        refuse_gpu_work_for_cpus(self.model, self.preprocess, self.compute)
        return self
