"""Print the ECA family: the figures of the model cards next to those measured with this installation."""

from typing import Any

from pipelines.config.models import ModelsConfig
from pipelines.runtime.job import main


def print_models(config: ModelsConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    from pipelines.models.table import run  # late: torch and timm

    return run(config)


if __name__ == "__main__":
    main("jobs.models", ModelsConfig, print_models)
