"""Measure a model on labelled images: top-1 and top-5, every image counted once."""

from typing import Any

from pipelines.config.evaluate import EvaluateConfig
from pipelines.models.process import ModelProcess
from pipelines.runtime.job import main


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    with ModelProcess(config.model, config.preprocess) as model:
        # Late: Ray and Arrow take a second to import, while the model's process imports torch and timm.
        from pipelines.downstream.evaluation import run

        return run(config, model)


if __name__ == "__main__":
    main("jobs.evaluate", EvaluateConfig, evaluate)
