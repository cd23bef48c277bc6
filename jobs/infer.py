"""Label and embed images: top-k predictions and embeddings as Parquet."""

from typing import Any

from pipelines.config.infer import InferConfig
from pipelines.models.process import ModelProcess
from pipelines.runtime.job import main


def label_and_embed(config: InferConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    with ModelProcess(config.model, config.preprocess) as model:
        # Late: Ray and Arrow take a second to import, while the model's process imports torch and timm.
        from pipelines.inference.run import run

        return run(config, model)


if __name__ == "__main__":
    main("jobs.infer", InferConfig, label_and_embed)
