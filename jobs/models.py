"""Print the ECA family: what the model cards say beside what this installation measures."""

import sys
from typing import Any

from pipelines.config.models import ModelsConfig
from pipelines.job import run_job


def print_models(config: ModelsConfig) -> dict[str, Any]:
    """Run the job; returns the summary."""
    from pipelines.models.table import run  # late: torch and timm

    return run(config)


if __name__ == "__main__":
    sys.exit(run_job("jobs.models", ModelsConfig, print_models))
