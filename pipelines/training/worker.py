"""Entry point of a training worker. Ray Train's controller unpickles it too, so it does not import torch."""

from typing import TYPE_CHECKING, Any

from pipelines.errors import RunError

if TYPE_CHECKING:
    from pipelines.training.job import TrainJob


def run_worker(config: "dict[str, TrainJob]") -> dict[str, Any]:
    """Run the training loop for `config["job"]`, and return its results.

    Raises:
        RequestError: The request is wrong.
        RunError: The run failed, and would fail again after a restart.
    """
    import torch

    from pipelines.training.failures import as_fatal
    from pipelines.training.loop import train_worker

    try:
        return train_worker(config["job"])
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{reason} Raise optim.grad_accum_steps to make the microbatches smaller") from None
    except Exception as error:
        raise as_fatal(error) from error
