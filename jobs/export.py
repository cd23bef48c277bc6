"""Write a checkpoint of jobs.train as a timm directory."""

from typing import Any

from pipelines.config.export import ExportConfig
from pipelines.runtime.job import main


def export(config: ExportConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    from pipelines.training.export import run  # late: torch and timm

    return run(config)


if __name__ == "__main__":
    main("jobs.export", ExportConfig, export)
