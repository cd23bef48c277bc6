"""Train or fine-tune a classifier, on any number of workers."""

from typing import Any

from pipelines.config.train import TrainConfig
from pipelines.runtime.job import main


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    from pipelines.training.run import run  # late: torch, timm and Ray

    return run(config)


def dry_run(config: TrainConfig) -> None:
    """Print what the job would do."""
    from pipelines.training.run import dry_run  # late: torch, timm and Ray

    dry_run(config)


if __name__ == "__main__":
    main("jobs.train", TrainConfig, train, dry_run=dry_run)
