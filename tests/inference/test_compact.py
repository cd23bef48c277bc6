"""Compaction: that rows stay as they are, wherever it is broken off."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local import ObjectStore, RayHead
from pipelines.inference import compact
from pipelines.inference.commit import find_done, list_files, list_sizes
from pipelines.inference.compact import JOURNAL, compact_group, plan_compaction, settle_compaction
from pipelines.inference.schema import FAILED, parts_schema
from pipelines.inference.write import PartWriter
from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, read_bytes, remove, write_bytes
from tests.support.infer import infer, read_kind

MIB = 1 << 20
NUM_ROWS = 200


def test_small_neighbours_are_grouped_to_files_of_a_good_size() -> None:
    sizes = {f"part-{index:012d}.parquet": 16 * MIB for index in range(0, 3000, 100)}
    sizes |= {"part-000000000950.parquet": 300 * MIB, "part-000000009999.parquet": 64 * MIB}
    groups = plan_compaction(sizes)
    taken = [name for group in groups for name in group.sources]
    assert taken == sorted(name for name, size in sizes.items() if size < 64 * MIB)
    assert [len(group.sources) for group in groups] == [8, 8, 8, 6]
    assert all(64 * MIB <= group.num_bytes <= 512 * MIB for group in groups)
    assert all(group.num_bytes == sum(sizes[name] for name in group.sources) for group in groups)
    assert not {group.target for group in groups} & set(sizes)


@pytest.mark.parametrize(("count", "num_groups"), [(3, 0), (4, 1), (8, 1), (12, 2), (11, 1)])
def test_what_is_left_over_joins_the_last_or_stays(count: int, num_groups: int) -> None:
    sizes = {f"part-{index:012d}.parquet": 16 * MIB for index in range(count)}
    groups = plan_compaction(sizes)
    assert (len(groups), sum(len(group.sources) for group in groups)) == (num_groups, count if num_groups else 0)


def test_many_files_of_failed_rows_become_few() -> None:
    assert plan_compaction({f"failed-{index:012d}.parquet": 900 for index in range(63)}) == []
    groups = plan_compaction({f"failed-{index:012d}.parquet": 900 for index in range(1100)})
    assert [len(group.sources) for group in groups] == [1024, 76]
    assert all(group.target.startswith("failed-") for group in groups)


def test_what_was_compacted_can_be_again() -> None:
    names = ["part-000000000000-0123abcd.parquet", "part-000000000007.parquet"]
    (group,) = plan_compaction(dict.fromkeys(names, 40 * MIB))
    assert group.sources == names
    assert group.target.startswith("part-000000000000-")
    assert group.target not in names


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output of good and failed rows in files of a few rows each, which count as small ones."""
    monkeypatch.setattr(compact, "FULL_BYTES", 20_000)
    monkeypatch.setattr(compact, "MIN_BYTES", 10_000)
    monkeypatch.setattr(compact, "MIN_FAILED_FILES", 4)
    if request.param == "s3":
        request.getfixturevalue("store")
    uri = str(tmp_path) if request.param == "local" else f"s3://scratch/{tmp_path.name}"
    schema = parts_schema(2, 16)
    writer = PartWriter(uri, schema, {"fingerprint": "f"})
    for start in range(0, NUM_ROWS, 10):
        writer(_rows(np.arange(start, start + 10), schema))
    return uri


def _rows(ids: Any, schema: pa.Schema) -> pa.Table:
    is_good = ids % 10 != 3
    rows = {
        "id": ids,
        "uri": [f"u{index}" for index in ids],
        "width": ids + 1,
        "height": ids + 2,
        "index": [[int(index), 1] for index in ids],
        "prob": [[0.5, 0.25]] * len(ids),
        "label": [["a", "b"]] * len(ids),
        "embedding": np.random.default_rng(int(ids[0])).random((len(ids), 16)).tolist(),
    }
    table = pa.table({name: pa.array(rows[name], schema.field(name).type) for name in schema.names})
    kinds = pa.array([None if good else "empty" for good in is_good], pa.string())
    retries = pa.array([0] * len(ids), pa.int32())
    added = {"error_kind": kinds, "error_message": kinds, "num_retries": retries}
    return pa.table({**dict(zip(table.column_names, table.columns)), **added})


def assert_is_compacted(uri: str, good: pa.Table, failed: pa.Table) -> None:
    assert read_kind(uri, "part").equals(good)
    assert read_kind(uri, "failed").equals(failed)
    assert len([name for name in list_files(uri) if name.startswith("failed-")]) == 1
    assert JOURNAL not in list_names(uri)


def _break_off_never(uri: str, groups: list[compact.Group]) -> None:
    for group in groups:
        compact_group(uri, group)


def _break_off_before_the_first(uri: str, groups: list[compact.Group]) -> None:
    pass


def _break_off_before_a_file_goes(uri: str, groups: list[compact.Group]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "remove", lambda uri: None)
        compact_group(uri, groups[0])


def _break_off_amid_the_files_that_go(uri: str, groups: list[compact.Group]) -> None:
    compact_group(uri, groups[1])
    _break_off_before_a_file_goes(uri, groups)
    remove(uris.join(uri, groups[0].sources[1]))


@pytest.mark.parametrize(
    "break_off",
    [
        _break_off_never,
        _break_off_before_the_first,
        _break_off_before_a_file_goes,
        _break_off_amid_the_files_that_go,
    ],
)
def test_wherever_it_breaks_off_the_next_run_finds_each_row_once(
    output: str, break_off: Callable[[str, list[compact.Group]], None]
) -> None:
    good, failed = read_kind(output, "part"), read_kind(output, "failed")
    assert (good.num_rows, failed.num_rows, failed.schema.names) == (180, 20, FAILED.names)
    groups = plan_compaction(list_sizes(output))
    assert len(groups) > 2
    write_bytes(uris.join(output, JOURNAL), json.dumps([group.__dict__ for group in groups]).encode())
    break_off(output, groups)

    done = find_done(output, NUM_ROWS)
    assert (len(done.ids), done.failures.total()) == (NUM_ROWS, 20)
    assert done.names == set(list_files(output))
    assert read_kind(output, "part").equals(good)
    assert read_kind(output, "failed").equals(failed)
    assert JOURNAL not in list_names(output)
    for group in plan_compaction(list_sizes(output)):
        compact_group(output, group)
    assert_is_compacted(output, good, failed)
    assert len([name for name in list_files(output) if name.startswith("part-")]) <= len(groups)


def test_a_file_without_its_end_takes_no_rows_with_it(output: str) -> None:
    good, failed = read_kind(output, "part"), read_kind(output, "failed")
    group = plan_compaction(list_sizes(output))[0]
    write_bytes(uris.join(output, JOURNAL), json.dumps([group.__dict__]).encode())
    write_bytes(uris.join(output, group.target), read_bytes(uris.join(output, group.sources[0]))[:-100])
    assert len(find_done(output, NUM_ROWS).ids) == NUM_ROWS
    assert read_kind(output, "part").equals(good)
    assert read_kind(output, "failed").equals(failed)


def test_a_task_that_runs_again_finds_its_file(output: str) -> None:
    group = plan_compaction(list_sizes(output))[0]
    assert compact_group(output, group) == compact_group(output, group)
    settle_compaction(output)  # nothing to settle


@pytest.mark.slow
def test_a_run_ends_with_files_of_a_good_size(
    ray_server: RayHead, store: ObjectStore, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "FULL_BYTES", 150_000)
    monkeypatch.setattr(compact, "MIN_BYTES", 75_000)
    model = {"name": "ecaresnet26t", "weights": "random"}
    output = {"uri": str(tmp_path / "out"), "commit_rows": 8}
    options = {"compute": {"batch_size": 8}, "preprocess": {"image_size": 64}}
    request = {"input": {"uri": str(photographs)}, "output": output, "model": model, **options}
    summary = infer(ray_server, **request)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.parquet")}
    assert (summary["num_files"], summary["num_ok"]) == (len(sizes), 66)
    assert min(sizes.values()) > 60_000
    assert set(json.loads((tmp_path / "out" / "_files.json").read_text())) == set(sizes)
    assert read_kind(str(tmp_path / "out"), "part")["id"].to_pylist() == list(range(66))
    metadata = pq.read_schema(tmp_path / "out" / min(sizes)).metadata
    assert {b"fingerprint", b"label_names"} <= set(metadata)
    assert infer(ray_server, **request)["num_resumed"] == 66
