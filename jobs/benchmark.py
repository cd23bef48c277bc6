"""Measure the ceiling of each stage of jobs.infer and the rate of the whole pipeline, and find the bottleneck."""

from typing import Any

from pipelines.config.benchmark import BenchmarkConfig
from pipelines.models.process import ModelProcess
from pipelines.runtime.job import main


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    with ModelProcess(config.model, config.preprocess) as model:
        from pipelines.benchmark.run import run  # late: Ray and Arrow, while the model's process imports torch and timm

        return run(config, model)


if __name__ == "__main__":
    main("jobs.benchmark", BenchmarkConfig, benchmark)
