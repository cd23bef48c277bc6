"""Print the ECA family: what the model cards say beside what this installation measures."""

from typing import Any

from pipelines.config.models import ModelsConfig
from pipelines.runtime.job import main


def print_models(config: ModelsConfig) -> dict[str, Any]:
    """Run the job; returns the summary."""
    from pipelines.models.table import run  # late: torch and timm

    return run(config)


if __name__ == "__main__":
    main("jobs.models", ModelsConfig, print_models)
