"""Measure the ceiling of each stage of infer, the rate of the whole, and which stage binds."""

from typing import Any

from pipelines.config.benchmark import BenchmarkConfig
from pipelines.models.process import ModelProcess
from pipelines.runtime.job import main


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Run the job; returns the summary."""
    with ModelProcess(config.model, config.preprocess) as model:
        from pipelines.benchmark.run import run  # late: Ray and Arrow

        return run(config, model)


if __name__ == "__main__":
    main("jobs.benchmark", BenchmarkConfig, benchmark)
