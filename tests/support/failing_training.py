"""Training worker with a bug. Each start leaves a file in the folder `starts` next to the output."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def failing_worker(config: dict[str, Any]) -> Any:
    """Replace `run_worker`. The last worker fails in its second step."""
    from pipelines.training.learner import Learner
    from pipelines.training.worker import run_worker

    learn = Learner.learn
    folder = Path(config["job"].config.output.uri).parent / "starts"
    folder.mkdir(exist_ok=True)
    (folder / str(time.time_ns())).touch()

    def fail(self: Learner, local_batch: dict[str, Any]) -> "torch.Tensor":
        if self.step == 1 and self.rank == self.world_size - 1:
            raise TypeError("the local batch is invalid")
        return learn(self, local_batch)

    Learner.learn = fail  # type: ignore[method-assign]
    return run_worker(config)
