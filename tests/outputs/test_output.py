"""Reads of the rows of an output."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.local.object_store import ObjectStore
from pipelines.errors import DamagedFileError, RequestError
from pipelines.inputs.reader import Listing
from pipelines.outputs import Output, open_output
from pipelines.outputs.commit import Commit
from pipelines.outputs.commit_log import CommitLog, Merge
from pipelines.outputs.compaction import merge_files
from pipelines.outputs.contents import Done
from pipelines.outputs.schema import ERROR_FIELDS
from pipelines.storage.filesystem import remove, write_bytes
from tests.support.schemas import schema_of_parts

NUM_ROWS = 20
SCHEMA = schema_of_parts(2, 4)
RECORD: dict[str, Any] = {"identity": {}, "config": {}}


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    """Return an empty output, on local disk or in the object store."""
    if request.param == "s3":
        request.getfixturevalue("store")
    return Output(str(tmp_path / "out") if request.param == "local" else f"s3://scratch/{tmp_path.name}")


@pytest.fixture
def commit(output: Output) -> Iterator[Commit]:
    """Yield the unfinished commit of a run that wrote three batches. Rows with odd ids have failed."""
    with output.claim() as lease:
        lease.acquire()
        output.write_run(RECORD)
        done = output.find_done(NUM_ROWS, lease.fence.epoch)
        commit = output.begin(lease, done)
        writer = commit.writer(SCHEMA, {"model": "m"})
        for ids in ([12, 13, 14, 15], [0, 1, 2, 3], [4, 5, 6, 7]):
            commit.add(writer(predictions(ids)).to_pylist()[0])
        yield commit


def predictions(ids: list[int]) -> pa.Table:
    """Return rows as replicas pass them to the writer."""
    kinds = [None if index % 2 == 0 else "empty" for index in ids]
    columns = {
        "id": pa.array(ids, pa.int64()),
        "uri": pa.array([f"/in/{index}.jpg" for index in ids]),
        "width": pa.array([40] * len(ids), pa.int32()),
        "height": pa.array([30] * len(ids), pa.int32()),
        "index": pa.array([[index, 1] for index in ids], pa.list_(pa.int32())),
        "prob": pa.array([[0.5, 0.25] for _ in ids], pa.list_(pa.float32())),
        "label": pa.array([["a", "b"] for _ in ids], pa.list_(pa.string())),
        "embedding": pa.array([[float(index)] * 4 for index in ids], pa.list_(pa.float32(), 4)),
        ERROR_FIELDS[0].name: pa.array(kinds, pa.string()),
        ERROR_FIELDS[1].name: pa.array(kinds, pa.string()),
        "num_retries": pa.array([0] * len(ids), pa.int32()),
        "is_clipped": pa.array([False] * len(ids)),
    }
    return pa.table(columns)


def finish(commit: Commit) -> None:
    commit.tidy(lambda: None)
    commit.finish(RECORD)


def test_table_returns_all_rows_sorted_by_id(output: Output, commit: Commit) -> None:
    finish(commit)
    table = open_output(output.uri).table()
    assert table["id"].to_pylist() == [0, 2, 4, 6, 12, 14]
    assert table.schema.names == SCHEMA.names
    assert table["embedding"].to_pylist()[3] == [6.0] * 4
    failed = open_output(output.uri).table(failed=True)
    assert failed.to_pylist()[0] == {"id": 1, "uri": "/in/1.jpg", "error_kind": "empty", "error_message": "empty"}


def test_table_returns_the_requested_columns_in_order(output: Output, commit: Commit) -> None:
    finish(commit)
    assert open_output(output.uri).table(["uri", "width"]).column_names == ["uri", "width"]
    with pytest.raises(RequestError, match=r"has no column 'labels'; it has: id, uri, width"):
        open_output(output.uri).table(["labels"])
    with pytest.raises(RequestError, match="has no column 'labels'"):
        list(open_output(output.uri).batches(["labels"]))


def test_batches_contain_the_rows_of_the_table(output: Output, commit: Commit) -> None:
    finish(commit)
    batches = list(open_output(output.uri).batches(["id", "embedding"], batch_rows=1))
    assert [batch.num_rows for batch in batches] == [1] * 6
    assert pa.Table.from_batches(batches).sort_by("id").equals(open_output(output.uri).table(["id", "embedding"]))
    assert sum(batch.num_rows for batch in open_output(output.uri).batches(failed=True)) == 6


def test_table_of_an_unfinished_run_has_the_rows_written_so_far(output: Output, commit: Commit) -> None:
    assert open_output(output.uri).table(["id"])["id"].to_pylist() == [0, 2, 4, 6, 12, 14]


def test_uncommitted_files_are_ignored(output: Output, commit: Commit) -> None:
    finish(commit)
    content = (Path(output.uri) / output.list_files()[0]).read_bytes() if output.uri.startswith("/") else b"late"
    write_bytes(output.uri_of("part-000000000000-e000000.parquet"), content)
    assert open_output(output.uri).table(["id"]).num_rows == 6


def test_rows_of_merged_files_are_returned_once(output: Output, commit: Commit) -> None:
    """Between a merge and the removal of its sources, both exist."""
    fence = commit._lease.fence
    parts = [name for name in output.list_files() if name.startswith("part-")]
    log = CommitLog(fence)
    log.begin(output.list_files(), [])
    merge = Merge(target="part-000000000000-e000001-merged.parquet", sources=parts)
    log.merge([merge])
    contents = {name: read_file(output, name) for name in parts}
    merge_files(fence, merge)
    for name, content in contents.items():
        write_bytes(output.uri_of(name), content)
    assert open_output(output.uri).table(["id"])["id"].to_pylist() == [0, 2, 4, 6, 12, 14]


def read_file(output: Output, name: str) -> bytes:
    from pipelines.storage.filesystem import read_bytes

    return read_bytes(output.uri_of(name))


def test_output_without_rows_is_an_empty_table(output: Output) -> None:
    with output.claim() as lease:
        lease.acquire()
        output.write_run(RECORD)
        done: Done = output.find_done(0, lease.fence.epoch)
        finish(output.begin(lease, done))
    assert open_output(output.uri).table(["id"]).num_rows == 0
    assert list(open_output(output.uri).batches(["id"])) == []


def test_folder_without_a_run_record_is_refused(output: Output) -> None:
    with pytest.raises(RequestError, match=r"is not the output of a job: it has no _run\.json"):
        open_output(output.uri)


def test_damaged_or_missing_files_are_refused_by_name(output: Output, commit: Commit) -> None:
    finish(commit)
    name = output.list_files()[-1]
    write_bytes(output.uri_of(name), b"PAR1 no more")
    with pytest.raises(DamagedFileError, match=name):
        open_output(output.uri).table()
    remove(output.uri_of("_files.json"))
    with pytest.raises(DamagedFileError, match=r"_files\.json is missing"):
        open_output(output.uri).table()


def test_embeddings_convert_to_a_matrix(output: Output, commit: Commit) -> None:
    """The expression is the one that the README and the docs show."""
    finish(commit)
    table = open_output(output.uri).table(["id", "embedding"])
    matrix = table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    assert np.array_equal(matrix[:, 0], table["id"].to_numpy().astype(np.float32))


def test_files_that_a_parquet_reader_would_find_are_listed(output: Output, commit: Commit) -> None:
    finish(commit)
    strays = ["late/part-1.parquet", "LATE.PARQUET", "_hidden/part-1.parquet", ".part.parquet", "notes.txt"]
    for name in strays:
        write_bytes(output.uri_of(name), b"x")
    assert sorted(output.list_parquet_paths()) == sorted([*output.list_files(), *strays[:2]])


def test_finished_output_is_compared_with_its_record(output: Output, commit: Commit) -> None:
    def matches(num_inputs: int) -> bool:
        return output.matches_record(output.find_done(num_inputs, epoch=1))

    commit.add(commit.writer(SCHEMA, {"model": "m"})(predictions([8, 9, 10, 11])).to_pylist()[0])
    assert not matches(16)  # every input has a row, but there is no record yet
    finish(commit)
    assert matches(16)
    assert not matches(NUM_ROWS)
    duplicate = read_file(output, output.list_files()[-1])
    write_bytes(output.uri_of("part-000000000000-e000000.parquet"), duplicate)
    assert not matches(16)


LISTING = Listing(pa.table({"uri": ["/in/0.jpg"], "size_bytes": [7], "etag": ["e"]}), num_excluded=2)


def test_inputs_are_pinned_once(output: Output) -> None:
    assert output.find_manifest() is None
    manifest = output.write_manifest("/in", ["*.txt"], LISTING, epoch=4, reader="files")
    info = manifest.info
    assert (info.input_uri, info.exclude, info.num_excluded, info.reader) == ("/in", ["*.txt"], 2, "files")
    assert info.file_prefix == "inputs-000004-"
    assert output.find_manifest() == manifest
    assert manifest.folder_uri == output.uri_of("_manifest")


def test_rows_without_a_manifest_are_refused(output: Output, commit: Commit) -> None:
    first = output.list_files()[0]
    with pytest.raises(RequestError, match=f"{output.uri} contains {first} but no _manifest/manifest.json, without"):
        output.find_manifest()
    assert output.list_sizes() == {name: len(read_file(output, name)) for name in output.list_files()}


def test_run_that_changed_meanwhile_is_refused(output: Output) -> None:
    output.write_run(RECORD)
    found = output.find_run()
    output.refuse_if_changed(found)
    output.write_run(RECORD | {"config": {"a": 1}})
    with pytest.raises(RequestError, match=f"another run changed {output.uri} while this one was starting"):
        output.refuse_if_changed(found)


def test_output_is_complete_once_it_is_marked(output: Output) -> None:
    output.write_run(RECORD)
    assert not output.is_complete()
    output.mark_complete()
    assert output.is_complete()
    assert "_SUCCESS" in output.list_names()


def test_files_that_killed_writes_left_are_removed(output: Output, store: ObjectStore) -> None:
    output.write_run(RECORD)
    if output.uri.startswith("/"):
        leftover = Path(output.uri, f".part-1.parquet.{'0' * 32}")
        leftover.write_bytes(b"x")
        os.utime(leftover, (0, 0))
    output.abort_unfinished_uploads()
    assert output.list_names() == ["_run.json"]
