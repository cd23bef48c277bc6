"""Config of `jobs.infer`."""

from pydantic import model_validator

from pipelines.config.base import Section
from pipelines.config.sections import (
    ComputeConfig,
    FailureConfig,
    InputConfig,
    ModelConfig,
    OutputConfig,
    OutputsConfig,
    PreprocessConfig,
    refuse_gpu_work_for_cpus,
)


class InferConfig(Section):
    """Label and embed images: top-k predictions and embeddings as Parquet."""

    input: InputConfig
    output: OutputConfig
    model: ModelConfig = ModelConfig()
    outputs: OutputsConfig = OutputsConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    compute: ComputeConfig = ComputeConfig()
    failure: FailureConfig = FailureConfig()

    @model_validator(mode="after")
    def _something_is_written(self) -> "InferConfig":
        if self.outputs.topk == 0 and not self.outputs.embedding:
            raise ValueError("nothing to write: outputs.topk is 0 and outputs.embedding is false")
        return self

    @model_validator(mode="after")
    def _gpu_work_has_gpus(self) -> "InferConfig":
        refuse_gpu_work_for_cpus(self.model, self.preprocess, self.compute)
        return self
