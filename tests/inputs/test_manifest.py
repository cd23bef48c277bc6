"""Manifest: pinned inputs, their files, and damage to them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DamagedFileError, RequestError
from pipelines.inputs import manifest as module
from pipelines.inputs.manifest import MANIFEST_SCHEMA, find_manifest, write_manifest
from pipelines.inputs.reader import Listing

NUM_INPUTS = 250


@pytest.fixture(autouse=True)
def short_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_FILE", 100)
    module._cached_file.cache_clear()


def listing(num_inputs: int = NUM_INPUTS) -> Listing:
    columns = {
        "uri": [f"/in/{index:04d}.jpg" for index in range(num_inputs)],
        "size_bytes": pa.array([None if index % 7 == 0 else index for index in range(num_inputs)], pa.int64()),
        "etag": [f"e{index}" for index in range(num_inputs)],
        "caption": pa.array([index / 2 for index in range(num_inputs)], pa.float32()),
    }
    return Listing(pa.table(columns), num_excluded=3)


def write(folder: Path, **changes: Any) -> module.Manifest:
    arguments: dict[str, Any] = {"exclude": ["*.txt"], "listing": listing(), "epoch": 12, "reader": "files"}
    return write_manifest(str(folder), "/in", **(arguments | changes))


def test_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "format": 3,
        "input_uri": "/in",
        "exclude": ["*.txt"],
        "num_inputs": NUM_INPUTS,
        "num_excluded": 3,
        "num_files": 3,
        "rows_per_file": 100,
        "file_prefix": "inputs-000012-",
        "reader": "files",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"inputs-000012-{index:05d}.parquet" for index in range(3)),
        "manifest.json",
    ]
    found = find_manifest(str(tmp_path))
    assert found == written
    assert found.num_inputs == NUM_INPUTS
    ids = pa.array(range(NUM_INPUTS), pa.int64())
    assert found.table().equals(listing().table.add_column(0, "id", ids))
    assert found.carried == pa.schema([("caption", pa.float32())])


def test_rows_are_those_of_the_ids_without_sizes(tmp_path: Path) -> None:
    ids = np.array([0, 1, 99, 100, 249])
    rows = write(tmp_path).rows(ids)
    assert rows.column_names == ["id", "uri", "etag", "caption"]
    assert rows["id"].to_pylist() == ids.tolist()
    assert rows["uri"].to_pylist() == [f"/in/{index:04d}.jpg" for index in ids]
    assert rows["caption"].to_pylist() == [index / 2 for index in ids]


def test_manifest_of_no_inputs_has_no_files(tmp_path: Path) -> None:
    written = write(tmp_path, listing=listing(0))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (written.num_inputs, written.carried) == (0, pa.schema([]))


def test_folder_without_a_manifest(tmp_path: Path) -> None:
    assert find_manifest(str(tmp_path)) is None


def test_first_of_two_manifests_counts(tmp_path: Path) -> None:
    first = write(tmp_path)
    assert write(tmp_path) == first  # a retried request of the same run
    with pytest.raises(RequestError, match=f"another run pinned its inputs in {tmp_path} first: run the same"):
        write(tmp_path, epoch=13)
    assert find_manifest(str(tmp_path)) == first


@pytest.mark.parametrize("name", ["inputs-000012-00001.parquet", "inputs-000012-00000.parquet"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    manifest = write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DamagedFileError, match=f"{name} is missing: restore it from a backup"):
        manifest.table()
    with pytest.raises(DamagedFileError, match=f"{name} is missing"):
        manifest.rows(np.arange(NUM_INPUTS))


def test_manifest_with_too_few_rows_is_damaged(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "inputs-000012-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DamagedFileError, match=r"num_inputs is 250, but its files contain 249 rows\): restore it from"):
        manifest.table()


@pytest.mark.parametrize("name", MANIFEST_SCHEMA.names)
def test_file_without_a_column_is_damaged(tmp_path: Path, name: str) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "inputs-000012-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
    with pytest.raises(DamagedFileError, match=rf"inputs-000012-00000.parquet is damaged \(no column '{name}'\): rest"):
        manifest.table()


@pytest.mark.parametrize(
    "change",
    [
        {"num_files": 2},
        {"num_inputs": -1},
        {"num_inputs": 301},
        {"rows_per_file": 0},
        {"file_prefix": "../inputs-"},
        {"file_prefix": "Inputs-"},
        {"reader": 5},
    ],
)
def test_manifest_that_contradicts_itself_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedFileError, match=r"manifest\.json is damaged"):
        find_manifest(str(tmp_path))


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    for path in sorted(tmp_path.glob("inputs-*.parquet")):
        path.rename(tmp_path / path.name.replace("inputs-000012-", "part-"))
    path = tmp_path / "manifest.json"
    kept = {
        name: value for name, value in json.loads(path.read_text()).items() if name not in ("file_prefix", "reader")
    }
    path.write_text(json.dumps(kept | {"format": 1}))
    found = find_manifest(str(tmp_path))
    assert found is not None
    assert (found.info.file_prefix, found.reader.name) == ("part-", "files")
    assert found.table().num_rows == NUM_INPUTS
