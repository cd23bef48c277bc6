"""What Ray Train runs in each worker. Imports no torch: Ray Train's controller unpickles it too, and needs none."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.training.job import TrainJob


def run_worker(config: "dict[str, TrainJob]") -> dict[str, Any]:
    """Train as the `job` says."""
    from pipelines.training.loop import train_worker

    return train_worker(config["job"])
