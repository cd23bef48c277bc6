"""One-line descriptions of failures, made from the exceptions of Ray 2.60."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from cluster.local.ray_head import RayHead
from pipelines.errors import RunError, root_cause
from pipelines.outputs.writer import write_table
from pipelines.runtime.ray_session import ray_session

DISK_FULL = "OSError: [Errno 28] No space left on device: '/out/part-000000000000.parquet'"


def test_root_cause_names_outermost_error_and_innermost_cause() -> None:
    innermost, outermost = KeyError("id"), RuntimeError("a row is damaged")
    outermost.__cause__ = innermost
    assert root_cause(outermost) == "RuntimeError: a row is damaged (KeyError: 'id')"
    assert root_cause(RuntimeError()) == "RuntimeError"


def test_root_cause_extracts_the_error_from_traceback_text() -> None:
    text = (
        "ray::Map() (pid=1)\n  File x\nKeyError: 'id'\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n  File y\nobstore.exceptions.GenericError: denied\n\nDebug source: x"
    )
    assert root_cause(RuntimeError(text)) == "GenericError: denied Debug source: x (KeyError: 'id')"


def fill_disk(batch: pa.Table) -> pa.Table:
    raise OSError(28, "No space left on device", "/out/part-000000000000.parquet")


def refuse_write(batch: pa.Table) -> pa.Table:
    try:
        raise PermissionError(13, "AccessDenied")
    except PermissionError:
        raise RunError("cannot write s3://bucket/part-1.parquet: AccessDenied") from None


def wrap_error(batch: pa.Table) -> pa.Table:
    try:
        raise KeyError("id")
    except KeyError as error:
        raise ValueError("two lines\nof text") from error


class Replica:
    def __call__(self, batch: pa.Table) -> pa.Table:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


class BrokenReplica:
    def __init__(self) -> None:
        raise NotImplementedError("addmm is not implemented for 'Half'")

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def failure_of(stage: Callable[..., Any], **options: Any) -> str:
    import ray.data

    rows = ray.data.from_arrow(pa.table({"id": [1]}))
    with pytest.raises(ray.exceptions.RayError) as caught:
        rows.map_batches(stage, batch_format="pyarrow", num_cpus=0.5, **options).materialize()
    return root_cause(caught.value)


def test_root_cause_of_a_failed_stage_names_stage_cause_and_file(
    ray_server: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_server.address)
    monkeypatch.setenv("HOME", str(ray_server.home))
    with ray_session():
        assert failure_of(fill_disk) == f"fill_disk: {DISK_FULL}"
        assert failure_of(refuse_write) == "refuse_write: cannot write s3://bucket/part-1.parquet: AccessDenied"
        assert failure_of(wrap_error) == "wrap_error: ValueError: two lines of text (KeyError: 'id')"
        expected = "Replica: RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"
        assert failure_of(Replica, concurrency=1) == expected
        expected = "BrokenReplica: NotImplementedError: addmm is not implemented for 'Half'"
        assert failure_of(BrokenReplica, concurrency=1) == expected


def test_write_error_names_the_file() -> None:
    table = pa.table({"id": [3], "uri": ["a.jpg"]})
    with pytest.raises(RunError, match=r"cannot write /dev/null/out/part-3\.parquet: "):
        write_table("/dev/null/out", "part-3.parquet", table, table.schema)
