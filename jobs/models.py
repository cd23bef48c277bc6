"""Print the ECA family: what the model cards say beside what this installation measures."""

import sys
from collections.abc import Callable
from typing import Any

from pipelines.config.models import ModelsConfig
from pipelines.job import run_job


def _load_run() -> Callable[[ModelsConfig], dict[str, Any]]:
    from pipelines.models.table import run

    return run


if __name__ == "__main__":
    sys.exit(run_job("jobs.models", ModelsConfig, _load_run))
