"""Compaction: it keeps every row exactly once, wherever it is interrupted."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.object_store import ObjectStore
from cluster.local.ray_head import RayHead
from pipelines.errors import RequestError
from pipelines.outputs import compaction, writer
from pipelines.outputs import lease as lease_module
from pipelines.outputs.commit import Commit
from pipelines.outputs.commit_log import OLD_COMPACTION_FILE, CommitLog, Merge, remove_late_files
from pipelines.outputs.compaction import merge_files, plan_compaction
from pipelines.outputs.contents import Done, find_done
from pipelines.outputs.file_names import list_files, list_sizes
from pipelines.outputs.lease import Fence, Lease, LeaseLostError
from pipelines.outputs.schema import failed_schema
from pipelines.outputs.writer import PartWriter
from pipelines.storage import uris
from pipelines.storage.bulk import store_object
from pipelines.storage.filesystem import list_names, read_bytes, remove, write_bytes
from tests.support.infer import infer, read_kind
from tests.support.schemas import schema_of_parts

MIB = 1 << 20
NUM_ROWS = 200


def test_adjacent_small_files_are_grouped_to_target_size() -> None:
    sizes = {f"part-{index:012d}.parquet": 16 * MIB for index in range(0, 3000, 100)}
    sizes |= {"part-000000000950.parquet": 300 * MIB, "part-000000009999.parquet": 64 * MIB}
    groups = plan_compaction(sizes, epoch=3)
    sources = [name for group in groups for name in group.merge.sources]
    assert sources == sorted(name for name, size in sizes.items() if size < 64 * MIB)
    assert [len(group.merge.sources) for group in groups] == [8, 8, 8, 6]
    assert all(64 * MIB <= group.num_bytes <= 512 * MIB for group in groups)
    assert all(group.num_bytes == sum(sizes[name] for name in group.merge.sources) for group in groups)
    assert not {group.merge.target for group in groups} & set(sizes)


@pytest.mark.parametrize(("count", "num_groups"), [(3, 0), (4, 1), (8, 1), (12, 2), (11, 1)])
def test_small_remainder_joins_the_last_group_if_there_is_one(count: int, num_groups: int) -> None:
    sizes = {f"part-{index:012d}.parquet": 16 * MIB for index in range(count)}
    groups = plan_compaction(sizes, epoch=3)
    assert (len(groups), sum(len(group.merge.sources) for group in groups)) == (num_groups, count if num_groups else 0)


def test_failed_files_are_grouped_by_number() -> None:
    assert plan_compaction({f"failed-{index:012d}.parquet": 900 for index in range(63)}, epoch=3) == []
    groups = plan_compaction({f"failed-{index:012d}.parquet": 900 for index in range(1100)}, epoch=3)
    assert [len(group.merge.sources) for group in groups] == [1024, 76]
    assert all(group.merge.target.startswith("failed-") for group in groups)


def test_compacted_files_can_be_compacted_again() -> None:
    names = ["part-000000000000-0123abcd.parquet", "part-000000000007.parquet"]
    names.append("part-000000000100-e000002-merged.parquet")
    (group,) = plan_compaction(dict.fromkeys(names, 40 * MIB), epoch=3)
    assert group.merge.sources == names
    assert group.merge.target == "part-000000000000-e000003-merged.parquet"


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(compaction, "FULL_BYTES", 20_000)
    monkeypatch.setattr(compaction, "MIN_BYTES", 10_000)
    monkeypatch.setattr(compaction, "MIN_FAILED_FILES", 4)
    if request.param == "s3":
        request.getfixturevalue("store")
    return str(tmp_path) if request.param == "local" else f"s3://scratch/{tmp_path.name}"


@pytest.fixture
def fence(output: str) -> Iterator[Fence]:
    """Write small files of good and failed rows under a lease, and yield its fence."""
    with Lease(output) as lease:
        lease.acquire()
        CommitLog(lease.fence).begin([], [])
        part_writer = PartWriter(output, schema_of_parts(2, 16), {"fingerprint": "f"}, lease.fence)
        for start in range(0, NUM_ROWS, 10):
            part_writer(_rows(np.arange(start, start + 10), part_writer.parts_schema))
        yield lease.fence


def take_over(output: str) -> tuple[Fence, Done]:
    """Start the next run: take the lease, read the committed files, and remove the others."""
    write_bytes(uris.join(output, "_lock/epoch-000002.json"), read_bytes(uris.join(output, "_lock/epoch-000001.json")))
    fence = Fence(output, 2)
    fence.check(max_age_s=0)
    done = find_done(output, NUM_ROWS, epoch=2)
    CommitLog(fence).begin(done.names, done.removed)
    return fence, done


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


def merges_of(output: str, epoch: int) -> list[Merge]:
    return [group.merge for group in plan_compaction(list_sizes(output), epoch)]


def _no_interruption(fence: Fence, merges: list[Merge]) -> None:
    for merge in merges:
        merge_files(fence, merge)


def _before_the_first_file(fence: Fence, merges: list[Merge]) -> None:
    pass


def _before_a_source_is_removed(fence: Fence, merges: list[Merge]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "remove", lambda uri: None)
        merge_files(fence, merges[0])


def _while_sources_are_removed(fence: Fence, merges: list[Merge]) -> None:
    merge_files(fence, merges[1])
    _before_a_source_is_removed(fence, merges)
    remove(uris.join(fence.output_uri, merges[0].sources[1]))


def _in_the_middle_of_a_file(fence: Fence, merges: list[Merge]) -> None:
    """Leave a truncated file, as a store whose writes are not atomic would."""
    source = read_bytes(uris.join(fence.output_uri, merges[0].sources[0]))
    write_bytes(uris.join(fence.output_uri, merges[0].target), source[:-100])


@pytest.mark.parametrize(
    "interrupt",
    [
        _no_interruption,
        _before_the_first_file,
        _before_a_source_is_removed,
        _while_sources_are_removed,
        _in_the_middle_of_a_file,
    ],
)
def test_next_run_finds_each_row_once_after_any_interruption(
    output: str, fence: Fence, interrupt: Callable[[Fence, list[Merge]], None]
) -> None:
    good, failed = read_kind(output, "part"), read_kind(output, "failed")
    assert (good.num_rows, failed.num_rows, failed.schema.names) == (180, 20, failed_schema().names)
    merges = merges_of(output, epoch=1)
    assert len(merges) > 2
    CommitLog(fence).merge(merges)
    interrupt(fence, merges)

    next_fence, done = take_over(output)
    assert (len(done.ids), done.failures.total()) == (NUM_ROWS, 20)
    assert done.names == set(list_files(output))
    assert read_kind(output, "part").equals(good)
    assert read_kind(output, "failed").equals(failed)
    for merge in merges_of(output, epoch=2):
        merge_files(next_fence, merge)
    assert read_kind(output, "part").equals(good)
    assert read_kind(output, "failed").equals(failed)
    assert len([name for name in list_files(output) if name.startswith("failed-")]) == 1
    assert len([name for name in list_files(output) if name.startswith("part-")]) <= len(merges)


def test_merge_is_idempotent(output: str, fence: Fence) -> None:
    merge = merges_of(output, epoch=1)[0]
    assert merge_files(fence, merge) == merge_files(fence, merge)


def test_file_written_after_a_takeover_is_removed(output: str, fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process checks its fence and is frozen; another run takes over; the process resumes and its write lands."""
    merges = merges_of(output, epoch=1)
    CommitLog(fence).merge(merges)

    def store_after_takeover(uri: str, content: bytes, check: Callable[[], None]) -> int:
        check()
        take_over(output)
        return store_object(uri, content)

    monkeypatch.setattr(writer, "store_object", store_after_takeover)
    with pytest.raises(LeaseLostError, match=r"another run \(epoch 2\) has taken over"):
        merge_files(fence, merges[0])
    assert merges[0].target not in list_files(output)
    assert set(merges[0].sources) <= set(list_files(output))
    with pytest.raises(LeaseLostError):  # later merges do not even start
        merge_files(fence, merges[1])
    assert find_done(output, NUM_ROWS, epoch=3).names == set(list_files(output))


def test_file_that_lands_shortly_after_a_takeover_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a killed driver live on for some seconds, and an upload of theirs may end after the takeover."""
    monkeypatch.setattr(lease_module, "STRAGGLERS_S", 1.0)
    late = tmp_path / "part-000000000000-e000000.parquet"
    with Lease(str(tmp_path)) as lease:
        lease.acquire()
        lease.is_takeover = True
        commit = Commit(str(tmp_path), lease, find_done(str(tmp_path), NUM_ROWS, lease.fence.epoch))
        commit.begin()
        upload = threading.Timer(0.3, late.write_bytes, (b"late",))
        upload.start()
        commit.tidy(lambda: None)
        upload.join()
    assert not late.exists()


def test_late_file_that_the_successor_committed_is_kept(
    output: str, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = merges_of(output, epoch=1)[0]
    CommitLog(fence).merge([merge])

    def store_before_takeover(uri: str, content: bytes, check: Callable[[], None]) -> int:
        num_retries = store_object(uri, content, check)
        take_over(output)
        return num_retries

    monkeypatch.setattr(writer, "store_object", store_before_takeover)
    with pytest.raises(LeaseLostError):
        merge_files(fence, merge)
    assert merge.target in list_files(output)
    assert not set(merge.sources) & set(list_files(output))  # the successor removed them


def test_remove_late_files_keeps_files_of_the_successor(output: str, fence: Fence) -> None:
    next_fence, done = take_over(output)
    write_bytes(uris.join(output, "part-000000000000-e000001.parquet"), b"committed by the successor")
    write_bytes(uris.join(output, "part-000000000001-e000001.parquet"), b"late")
    write_bytes(uris.join(output, "part-000000000001-e000002.parquet"), b"the successor's own")
    remove_late_files(fence, num_passes=1)
    assert set(list_files(output)) == {*done.names, "part-000000000001-e000002.parquet"}
    next_fence.check(max_age_s=0)


def test_compaction_log_of_an_older_version_is_read(output: str) -> None:
    part_writer = PartWriter(output, schema_of_parts(2, 16), {"fingerprint": "f"})
    for start in (0, 10):
        part_writer(_rows(np.arange(start, start + 10), part_writer.parts_schema))
    old_names = {name: name.replace("-e000000", "") for name in list_files(output)}
    for name, old_name in old_names.items():
        write_bytes(uris.join(output, old_name), read_bytes(uris.join(output, name)))
        remove(uris.join(output, name))
    good, failed = read_kind(output, "part"), read_kind(output, "failed")
    sources, target = ["part-000000000000.parquet", "part-000000000010.parquet"], "part-000000000000-0123abcd.parquet"
    pq_bytes = pa.BufferOutputStream()
    pq.write_table(good, pq_bytes)
    write_bytes(uris.join(output, target), pq_bytes.getvalue().to_pybytes())
    old_log = [{"target": target, "sources": sources, "num_bytes": 1}]
    write_bytes(uris.join(output, OLD_COMPACTION_FILE), json.dumps(old_log).encode())
    with Lease(output) as lease:
        lease.acquire()
        done = find_done(output, NUM_ROWS, lease.fence.epoch)
        CommitLog(lease.fence).begin(done.names, done.removed)
    assert target in done.names
    assert done.removed == set(sources)
    assert read_kind(output, "part").equals(good)
    assert read_kind(output, "failed").equals(failed)
    assert OLD_COMPACTION_FILE not in list_names(output)


@pytest.mark.parametrize("name", ["../victim.txt", "/etc/passwd", "_run.json", "part-1.parquet/../../victim.txt"])
def test_compaction_log_that_names_other_files_is_damaged(tmp_path: Path, name: str) -> None:
    log = [{"target": "part-000000000000.parquet", "sources": [name], "num_bytes": 1}]
    (tmp_path / OLD_COMPACTION_FILE).write_text(json.dumps(log))
    with pytest.raises(RequestError, match=r"_compaction.json is damaged .*is not the name of a part or failed file"):
        find_done(str(tmp_path), NUM_ROWS, epoch=1)


@pytest.mark.slow
def test_infer_leaves_files_of_the_target_size(
    ray_server: RayHead, store: ObjectStore, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "FULL_BYTES", 150_000)
    monkeypatch.setattr(compaction, "MIN_BYTES", 75_000)
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
