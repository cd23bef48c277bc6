"""Sources of the pipeline: every pending id is in exactly one task, and no id that is done."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.engine.source import (
    RUN_ROWS_PER_TASK_BATCH,
    PendingInputs,
    TableSource,
    cut_into_tasks,
    rows_per_task,
)
from pipelines.inputs import idset, manifest
from pipelines.inputs.idset import IdSet
from pipelines.inputs.listing import LISTING_SCHEMA
from pipelines.inputs.reader import Listing


@pytest.mark.parametrize("size", [1, 8, 1003, 20_000])
def test_idset_behaves_like_a_set(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idset, "CHUNK_BYTES", 100)  # so that there are several chunks
    chosen = np.flatnonzero(np.random.default_rng(size).random(size) < 0.7)
    ids = IdSet(size)
    for part in np.array_split(np.append(chosen, chosen[:5]), 3):
        ids.add(part)
    missing = np.setdiff1d(np.arange(size), chosen)
    assert len(ids) == len(chosen)
    assert ids.missing(0, size).tolist() == missing.tolist()
    start, stop = size // 3, size * 3 // 4
    assert ids.missing(start, stop).tolist() == missing[(missing >= start) & (missing < stop)].tolist()
    for step in (1, 7, 16):
        assert ids.missing_at(np.arange(0, len(missing), step)).tolist() == missing[::step].tolist()


def test_idset_detects_overlapping_ids() -> None:
    ids = IdSet(13)
    ids.add(np.array([0, 9]))
    assert ids.contains(np.array([0, 1, 9, 12])).tolist() == [True, False, True, False]
    assert ids.overlaps(np.array([3, 9]))
    assert not ids.overlaps(np.array([1, 8, 12]))
    assert not ids.overlaps(np.array([], np.int64))


def test_idset_refuses_ids_out_of_range() -> None:
    for ids in ([-1], [3, 10]):
        with pytest.raises(ValueError, match="set of size 10"):
            IdSet(10).add(np.array(ids))


def test_pending_rows_come_once_and_in_order_from_all_manifest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "ROWS_PER_FILE", 100)
    names = [f"/images/{index:04d}.jpg" for index in range(1234)]
    columns = [pa.array(names), pa.array([1] * 1234, pa.int64()), pa.array([""] * 1234)]
    listing = Listing(pa.table(columns, schema=LISTING_SCHEMA), 0)
    written = manifest.write_manifest(str(tmp_path), "/images", [], listing)
    monkeypatch.setattr(manifest, "ROWS_PER_FILE", 70)  # a later version may use another size for new manifests
    done = IdSet(1234)
    done.add(np.flatnonzero(np.arange(1234) % 5))
    source = PendingInputs(written, done, IdSet(done.size), cut_into_tasks(247, 48, 16, num_threads=2))
    rows = pa.concat_tables([source.rows_of(task) for task in range(source.num_tasks)])
    assert source.num_tasks == 8
    assert rows.select(["id", "uri"]).to_pydict() == {"id": list(range(0, 1234, 5)), "uri": names[::5]}


def test_retried_rows_have_no_etag(tmp_path: Path) -> None:
    """Their objects may have been replaced since they were listed."""
    columns = [pa.array(["a", "b", "c", "d"]), pa.array([1] * 4, pa.int64()), pa.array(["e1", "e2", "e3", "e4"])]
    listing = Listing(pa.table(columns, schema=LISTING_SCHEMA), 0)
    written = manifest.write_manifest(str(tmp_path), "/images", [], listing)
    done, retried = IdSet(4), IdSet(4)
    done.add(np.array([0]))
    retried.add(np.array([2]))
    source = PendingInputs(written, done, retried, np.array([0, 3]))
    assert source.rows_of(0).to_pydict() == {"id": [1, 2, 3], "uri": ["b", "c", "d"], "etag": ["e2", "", "e4"]}


def test_retried_rows_keep_their_locators_in_any_order_of_columns(tmp_path: Path) -> None:
    columns = {"uri": ["a", "b"], "offset": [7, 8], "etag": ["e1", "e2"], "size_bytes": pa.array([1, 1], pa.int64())}
    written = manifest.write_manifest(str(tmp_path), "/images", [], Listing(pa.table(columns), 0))
    retried = IdSet(2)
    retried.add(np.array([1]))
    source = PendingInputs(written, IdSet(2), retried, np.array([0, 2]))
    assert source.rows_of(0).to_pydict() == {"id": [0, 1], "uri": ["a", "b"], "offset": [7, 8], "etag": ["e1", ""]}


def test_finished_output_has_no_pending_tasks(tmp_path: Path) -> None:
    done = IdSet(100)
    done.add(np.arange(100))
    starts = cut_into_tasks(0, 16, 16, num_threads=2)
    listing = Listing(LISTING_SCHEMA.empty_table(), 0)
    written = manifest.write_manifest(str(tmp_path), "/images", [], listing)
    assert PendingInputs(written, done, IdSet(done.size), starts).num_tasks == 0


def test_table_is_split_into_tasks_without_loss() -> None:
    table = pa.table({"id": range(100), "uri": [str(index) for index in range(100)]})
    source = TableSource(table, cut_into_tasks(100, 32, 16, num_threads=1))
    assert pa.concat_tables([source.rows_of(task) for task in range(source.num_tasks)]).equals(table)


def test_last_tasks_taper_off() -> None:
    def sizes(num_rows: int, task_rows: int, batch_size: int, num_threads: int) -> list[int]:
        starts: list[int] = cut_into_tasks(num_rows, task_rows, batch_size, num_threads).tolist()
        return [stop - start for start, stop in itertools.pairwise(starts)]

    assert sizes(1000, 128, 16, num_threads=2) == [128] * 6 + [8] + [64, 64, 32, 32, 16, 16]
    assert sizes(247, 48, 16, num_threads=2) == [48] * 3 + [7] + [32, 32, 16, 16]
    assert sizes(4096, 1024, 256, num_threads=2) == [1024] * 2 + [512] * 3 + [256, 256]
    assert sizes(100, 16, 16, num_threads=2) == [16] * 6 + [4]
    assert sizes(100, 128, 16, num_threads=1) == [64, 32, 4]
    assert sizes(5, 16, 16, num_threads=4) == [5]


def test_task_size_grows_with_the_run() -> None:
    assert rows_per_task(200, 16, 2) == 16
    assert rows_per_task(1000, 16, 2) == 64
    assert rows_per_task(10_000, 16, 2) == 128
    assert rows_per_task(10_000, 16, 64) == 16
    assert rows_per_task(RUN_ROWS_PER_TASK_BATCH, 16, 2) == 128
    assert rows_per_task(RUN_ROWS_PER_TASK_BATCH * 12, 16, 2) == 192
    assert rows_per_task(10**9, 16, 2) == 1024
    assert rows_per_task(10**5, 256, 2) == 256
    assert rows_per_task(10**6, 256, 2) == 1024
    assert rows_per_task(10**9, 256, 2, max_rows=600) == 512
    assert rows_per_task(10**9, 2048, 2) == 2048
