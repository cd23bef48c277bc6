"""Listing of objects: order, exclusion, empty results, and stores that only fsspec knows."""

import logging
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from pipelines.errors import RequestError
from pipelines.inputs import listing as module
from pipelines.inputs.listing import LISTING_SCHEMA, list_objects
from pipelines.inputs.lists import ListReader
from pipelines.inputs.reader import ListRequest


def test_objects_of_other_stores_are_listed_with_sizes() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/listed/b.jpg": b"123", "/listed/deep/a.jpg": b"1", "/listed/empty.jpg": b""})
    table = list_objects("memory://listed", []).table
    assert table.schema == LISTING_SCHEMA
    assert table["uri"].to_pylist() == [f"memory:///listed/{name}" for name in ("b.jpg", "deep/a.jpg", "empty.jpg")]
    assert table["size_bytes"].to_pylist() == [3, 1, 0]


def test_listing_is_sorted_and_complete_over_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 3)
    names = ["b.jpg", "a.jpg", "c/z.jpg", "c/a.jpg", "B.jpg", "d.jpg", "a/x.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    listing = list_objects(str(tmp_path), [])
    paths = [f"{tmp_path}/{name}" for name in sorted(names)]
    assert listing.table["uri"].to_pylist() == paths
    assert listing.table["size_bytes"].to_pylist() == [len(name) for name in sorted(names)]
    assert (listing.num_excluded, listing.linked) == (0, {})


def test_single_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(b"12345")
    table = list_objects(str(tmp_path / "one.jpg"), []).table
    assert (table["uri"].to_pylist(), table["size_bytes"].to_pylist()) == ([f"{tmp_path}/one.jpg"], [5])
    assert table["etag"][0].as_py()


def test_excluded_objects_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "b.txt", "deep/c.txt", "deep/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    caplog.set_level(logging.WARNING)
    listing = list_objects(str(tmp_path), ["*.txt", "*.png"])
    assert listing.table["uri"].to_pylist() == [f"{tmp_path}/a.jpg", f"{tmp_path}/deep/d.jpg"]
    assert listing.num_excluded == 2
    assert caplog.messages == [f"exclude: the pattern '*.png' matches nothing under {tmp_path}"]
    assert list_objects(str(tmp_path), ["deep/*"]).num_excluded == 2
    assert list_objects(str(tmp_path / "a.jpg"), ["b*"]).table.num_rows == 1


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"no input: nothing found under {tmp_path}$"):
        list_objects(str(tmp_path), [])
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(RequestError, match=f"no input: input.exclude matches all 1 objects under {tmp_path}$"):
        list_objects(str(tmp_path), ["*"])


def test_folder_markers_are_not_inputs() -> None:
    markers = pa.table({"uri": ["s3://b/x/", "s3://b/y/", "s3://b/z"], "size_bytes": [0, 5, 0], "etag": [""] * 3})
    kept = module._without_excluded(markers, "s3://b", module._Exclusion([]))
    assert kept["uri"].to_pylist() == ["s3://b/y/", "s3://b/z"]


def test_entries_of_a_list_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode() * 10)
    (tmp_path / "list.csv").write_text("uri\nb.jpg\na.jpg\nabsent.jpg\n")
    caplog.set_level(logging.WARNING)
    listing = ListReader().list(ListRequest(str(tmp_path / "list.csv"), ["*.txt"]))
    assert caplog.messages == [f"exclude has no effect on a list: {tmp_path}/list.csv"]
    assert listing.table.column_names == ["uri", "size_bytes", "etag"]
    found = {fetched.position: fetched.content for fetched in ListReader().read(listing.table, max_bytes=10)}
    assert (found[0], found[1]) == (b"b" * 10, b"a" * 10)
    assert getattr(found[2], "kind", None) == "not_found"
    small = {fetched.position: fetched.content for fetched in ListReader().read(listing.table, max_bytes=9)}
    assert getattr(small[0], "kind", None) == "too_many_bytes"
