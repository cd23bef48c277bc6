"""Labelled sets: class folders, lists, class indices, and pinning."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.object_store import ObjectStore
from pipelines.errors import RequestError
from pipelines.inputs.files import FilesReader
from pipelines.inputs.labelled import LabelledImages, find_pinned, pin, read_labelled
from pipelines.storage.filesystem import write_bytes

FILES = ("cat/1.jpg", "cat/deep/2.jpg", "dog/3.jpg", "ant/4.png", "ant/notes.txt")


def in_folders(root: str) -> str:
    for name in FILES:
        write_bytes(f"{root}/{name}", b"bytes")
    return root


def below(images: LabelledImages, root: str) -> list[tuple[str, str]]:
    return [(row["uri"].removeprefix(f"{root}/"), row["label"]) for row in images.table.to_pylist()]


@pytest.mark.parametrize("location", ["local", "s3"])
def test_labels_are_names_of_top_level_folders(location: str, tmp_path: Path, store: ObjectStore) -> None:
    root = in_folders(str(tmp_path / "set") if location == "local" else "s3://scratch/labelled")
    images = read_labelled(root + "/", ["*.txt"])
    assert below(images, root) == [
        ("ant/4.png", "ant"),
        ("cat/1.jpg", "cat"),
        ("cat/deep/2.jpg", "cat"),
        ("dog/3.jpg", "dog"),
    ]
    assert images.num_excluded == 1
    assert images.class_names() == ["ant", "cat", "dog"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_lists_provide_uris_and_labels(suffix: str, tmp_path: Path) -> None:
    table = pa.table({"label": ["7", "1"], "score": [0.5, 0.1], "uri": ["a/1.jpg", "s3://b/2.jpg"]})
    path = tmp_path / f"list.{suffix}"
    pa.csv.write_csv(table, path) if suffix == "csv" else pq.write_table(table, path)
    images = read_labelled(str(path), [])
    assert images.table.to_pylist() == [
        {"uri": f"{tmp_path}/a/1.jpg", "label": "7"},
        {"uri": "s3://b/2.jpg", "label": "1"},
    ]


def test_classes_are_matched_by_name() -> None:
    images = LabelledImages(pa.table({"uri": ["a", "b", "c"], "label": ["dog", "cat", "dog"]}), 0, FilesReader())
    assert images.targets(["cat", "dog"]).tolist() == [1, 0, 1]
    assert images.targets(["dog", "ant", "cat"]).tolist() == [0, 2, 0]
    with pytest.raises(
        RequestError, match=r"1 classes of the images are not among the model's 2 classes: 'dog' \(did you mean"
    ):
        images.targets(["cat", "dogs"])


def test_pinned_set_is_read_back_unchanged(tmp_path: Path) -> None:
    root = in_folders(str(tmp_path / "set"))
    images = read_labelled(root, ["*.txt"])
    assert find_pinned(str(tmp_path / "out"), "train") is None
    pin(str(tmp_path / "out"), "train", images)
    again = find_pinned(str(tmp_path / "out"), "train")
    assert again is not None
    assert (again.table.to_pylist(), again.num_excluded) == (images.table.to_pylist(), 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"path,label\na,b\n", "has no column uri; it has: path, label"),
        ("list.csv", b"uri,label\n", "the list .* has no rows"),
        ("list.csv", b"uri,label\na,\n", "row 1 has no label"),
        ("list.parquet", b"not parquet", "cannot be read"),
        ("list.parquet", b"PAR1....PAR1", "cannot be read"),
        ("set/loose.jpg", b"bytes", "contains loose.jpg outside any class folder: .* with exclude 'loose.jpg'"),
        ("set/.DS_Store", b"bytes", "contains only hidden and system files"),
    ],
)
def test_set_without_labels_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_bytes(str(tmp_path / name), content)
    location = tmp_path / name if name.startswith("list") else tmp_path / "set"
    with pytest.raises(RequestError, match=message):
        read_labelled(str(location), [])


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing found under"):
        read_labelled(str(tmp_path / "absent"), [])
