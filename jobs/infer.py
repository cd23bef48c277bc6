"""Label and embed images: top-k predictions and embeddings as Parquet."""

import sys
from collections.abc import Callable
from typing import Any

from pipelines.config.infer import InferConfig
from pipelines.job import run_job


def _load_run() -> Callable[[InferConfig], dict[str, Any]]:
    from pipelines.inference.run import run

    return run


if __name__ == "__main__":
    sys.exit(run_job("jobs.infer", InferConfig, _load_run))
