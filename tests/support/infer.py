"""Running `jobs.infer` in tests, and reading its output."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.ray_head import RayHead
from pipelines.config.infer import InferConfig
from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, read_bytes

REPOSITORY = Path(__file__).parents[2]


def infer(ray_server: RayHead, **sections: Any) -> dict[str, Any]:
    """Run the job in this process on the Ray of the tests, and return its summary."""
    from jobs.infer import label_and_embed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_server.address)
        patch.setenv("HOME", str(ray_server.home))
        return label_and_embed(InferConfig.model_validate(sections))


def run_command(*arguments: str, timeout_s: float = 120, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m ARGUMENTS` in the repository, as a user would."""
    import os

    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def summary_of(stdout: str) -> dict[str, Any]:
    """Return the summary, which is the last line of a job's stdout."""
    found: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
    return found


def read_kind(output_uri: str, kind: str) -> pa.Table:
    """Return all rows of `part-*.parquet` or `failed-*.parquet`, sorted by ID."""
    names = [name for name in list_names(output_uri) if name.startswith(f"{kind}-")]
    tables = [pq.read_table(pa.BufferReader(read_bytes(uris.join(output_uri, name)))) for name in names]
    return pa.concat_tables(tables).sort_by("id")
