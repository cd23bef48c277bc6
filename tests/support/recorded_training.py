"""`jobs.train` with workers that record the images of each step.

    python -m tests.support.recorded_training FOLDER [--section.key VALUE]...

Each worker writes a line of JSON for each step: `step` (from 0), `rank` and `ids`.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def recording_worker(config: dict[str, Any]) -> Any:
    """Replace `run_worker` in Ray Train, and record the IDs of each local batch."""
    from pipelines.training.learner import Learner
    from pipelines.training.worker import run_worker

    learn = Learner.learn
    path = Path(os.environ["RECORD_FOLDER"]) / f"{time.time_ns()}.jsonl"

    def recorded(self: Learner, local_batch: dict[str, Any]) -> "torch.Tensor":
        with path.open("a") as file:
            print(json.dumps({"step": self.step, "rank": self.rank, "ids": local_batch["id"].tolist()}), file=file)
        return learn(self, local_batch)

    Learner.learn = recorded  # type: ignore[method-assign]
    return run_worker(config)


def read_records(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the records of each worker, in the order of their starts."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.iterdir())]


def main() -> int:
    """Run the job."""
    from jobs.train import train
    from pipelines.config.train import TrainConfig
    from pipelines.runtime.job import run_job

    os.environ["RECORD_FOLDER"] = sys.argv[1]
    Path(sys.argv[1]).mkdir(exist_ok=True)
    from pipelines.runtime.logs import log_to_stderr

    log_to_stderr()  # before Ray is imported
    from pipelines.training import run

    run.run_worker = recording_worker  # type: ignore[attr-defined]
    return run_job("jobs.train", TrainConfig, train, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
