"""What Ray Train runs in each worker. Imports no torch: Ray Train's controller unpickles it too, and needs none."""

from typing import TYPE_CHECKING, Any

from pipelines.errors import RunError

if TYPE_CHECKING:
    from pipelines.training.job import TrainJob


def run_worker(config: "dict[str, TrainJob]") -> dict[str, Any]:
    """Train as the `job` says.

    Raises:
        RequestError: the request is wrong.
        RunError: the run failed, and would fail again after a restart.
    """
    import torch

    from pipelines.training.failures import as_final
    from pipelines.training.loop import train_worker

    try:
        return train_worker(config["job"])
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{reason} Raise optim.grad_accum_steps, to have smaller passes") from None
    except Exception as error:
        raise as_final(error) from error
