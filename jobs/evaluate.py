"""Measure a model on labelled images: top-1 and top-5, every image counted once."""

from typing import Any

from pipelines.config.evaluate import EvaluateConfig
from pipelines.models.process import ModelProcess
from pipelines.runtime.job import main


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the job; returns the summary."""
    with ModelProcess(config.model, config.preprocess) as model:
        from pipelines.downstream.evaluation import run  # Ray and Arrow, imported beside torch and timm

        return run(config, model)


if __name__ == "__main__":
    main("jobs.evaluate", EvaluateConfig, evaluate)
