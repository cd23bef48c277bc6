"""Readers: the input forms that every job accepts, and one that is registered from outside."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.local.photographs import crops, encode
from cluster.local.ray_head import RayHead
from pipelines.errors import RequestError
from pipelines.inputs import registry
from pipelines.inputs.files import FilesReader
from pipelines.inputs.labelled import find_pinned, pin, read_labelled
from pipelines.inputs.lists import ListReader
from pipelines.inputs.manifest import find_manifest, write_manifest
from pipelines.inputs.reader import Listing, ListRequest, Reader
from pipelines.inputs.registry import choose_reader, reader_named, register
from pipelines.outputs import open_output
from tests.support.infer import infer
from tests.support.zip_reader import ZipReader

NUM_IMAGES = 12


def label(ray_server: RayHead, source: Path, output: Path) -> dict[str, Any]:
    """Label all images, including broken ones, and return the summary."""
    sections = {"input": {"uri": str(source)}, "output": {"uri": str(output)}, "failure": {"max_fraction": 1}}
    return infer(ray_server, model={"name": "test_resnet", "weights": "random"}, **sections)


@pytest.fixture
def zip_reader(monkeypatch: pytest.MonkeyPatch) -> ZipReader:
    """Register a `ZipReader` for one test and return it."""
    monkeypatch.setattr(registry, "_READERS", list(registry._READERS))
    reader = ZipReader()
    register(reader)
    return reader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write photographs to two class folders, the fourth one broken, and return their parent folder."""
    for index, (name, image) in enumerate(crops(NUM_IMAGES, size=(64, 48))):
        path = tmp_path / "images" / ("odd" if index % 2 else "even") / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if index == 3 else encode(image))
    return tmp_path / "images"


@pytest.fixture
def archive(folder: Path, tmp_path: Path) -> Path:
    """Write the same photographs to a zip file, each with a comment, and return its path."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            member = zipfile.ZipInfo(path.relative_to(folder).as_posix())
            member.comment = f"photograph {number}".encode()
            file.writestr(member, path.read_bytes())
    return tmp_path / "images.zip"


def test_reader_is_chosen_by_suffix(zip_reader: ZipReader) -> None:
    kinds = {
        "s3://b/list.CSV": "list",
        "/a/list.parquet": "list",
        "/a/b.zip": "zip",
        "/a/b.jpg": "files",
        "/a": "files",
    }
    assert {uri: choose_reader(uri).name for uri in kinds} == kinds
    assert reader_named("zip") is zip_reader


def test_registered_reader_has_precedence_over_all_others(zip_reader: ZipReader) -> None:
    class EagerReader(ZipReader):
        name = "eager"

        def matches(self, uri: str) -> bool:
            return True

    register(EagerReader())
    assert {choose_reader(uri).name for uri in ("/a/list.csv", "/a/b.zip", "/a")} == {"eager"}


def test_manifest_of_an_unknown_reader_is_refused(tmp_path: Path) -> None:
    listing = FilesReader().list(ListRequest(str(Path(__file__)), []))
    manifest = write_manifest(str(tmp_path), "/in", [], listing, reader="tapes")
    assert find_manifest(str(tmp_path)) == manifest
    with pytest.raises(RequestError, match="the reader 'tapes', but this version of ecaray has only: files, list"):
        _ = manifest.reader


def test_locators_stay_in_the_manifest_and_other_columns_are_carried(
    zip_reader: ZipReader, archive: Path, tmp_path: Path
) -> None:
    listing = zip_reader.list(ListRequest(str(archive), []))
    manifest = write_manifest(str(tmp_path / "manifest"), str(archive), [], listing, reader=zip_reader.name)
    assert manifest.carried == pa.schema([("comment", pa.string())])
    rows = manifest.rows(pa.array([2, 5]).to_numpy())
    assert rows["member"].to_pylist() == [listing.table["member"][index].as_py() for index in (2, 5)]


def test_reader_yields_an_error_for_each_file_that_it_cannot_read(zip_reader: ZipReader, archive: Path) -> None:
    rows = zip_reader.list(ListRequest(str(archive), ["odd/*"])).table
    assert rows.num_rows == NUM_IMAGES // 2
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo(rows["member"][1].as_py())
        largest = max(file.getinfo(name).file_size for name in rows["member"].to_pylist())
    content = bytearray(archive.read_bytes())
    content[info.header_offset + 200] ^= 1
    archive.write_bytes(bytes(content))
    kinds = {found.position: getattr(found.content, "kind", None) for found in zip_reader.read(rows, largest)}
    assert kinds == {position: "corrupt" if position == 1 else None for position in range(NUM_IMAGES // 2)}
    assert "too_many_bytes" in {getattr(found.content, "kind", None) for found in zip_reader.read(rows, largest - 1)}
    archive.unlink()
    assert {getattr(found.content, "kind", None) for found in zip_reader.read(rows, largest)} == {"not_found"}


def test_infer_reads_through_a_registered_reader(
    zip_reader: ZipReader, archive: Path, folder: Path, tmp_path: Path, ray_server: RayHead
) -> None:
    """The rows equal those of the loose files, plus the carried column in good and failed rows."""
    summary = label(ray_server, archive, tmp_path / "zip")
    assert (summary["num_ok"], summary["num_failed"]) == (NUM_IMAGES - 1, 1)
    label(ray_server, folder, tmp_path / "loose")
    found, expected = open_output(str(tmp_path / "zip")).table(), open_output(str(tmp_path / "loose")).table()
    same = ["id", "width", "height", "index", "prob", "embedding"]
    assert found.select(same).equals(expected.select(same))
    assert found.column_names == [*expected.column_names, "comment"]
    assert found["uri"][0].as_py() == f"{archive}#even/{Path(expected['uri'][0].as_py()).name}"
    assert found["comment"].to_pylist() == [f"photograph {index}" for index in found["id"].to_pylist()]
    (failed,) = open_output(str(tmp_path / "zip")).table(failed=True).to_pylist()
    assert failed["comment"] == f"photograph {failed['id']}"
    assert failed["error_kind"] == "not_an_image"


def test_infer_and_evaluate_read_the_same_list(folder: Path, tmp_path: Path, ray_server: RayHead) -> None:
    paths = sorted(folder.rglob("*.jpg"), reverse=True)
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in paths]
    (tmp_path / "list.csv").write_text("uri,label\n" + "\n".join(lines))
    label(ray_server, tmp_path / "list.csv", tmp_path / "out")
    rows = open_output(str(tmp_path / "out")).table(["id", "uri"]).to_pylist()
    good = [index for index, path in enumerate(paths) if path.read_bytes() != b"no image"]
    assert rows == [{"id": index, "uri": str(paths[index])} for index in good]
    labelled = read_labelled(str(tmp_path / "list.csv"), [])
    assert labelled.table["uri"].to_pylist() == [str(path) for path in paths]


def test_list_for_infer_needs_no_labels(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri\na.jpg\n")
    listing = ListReader().list(ListRequest(str(tmp_path / "list.csv"), []))
    assert listing.table.to_pylist() == [{"uri": f"{tmp_path}/a.jpg", "size_bytes": None, "etag": ""}]
    with pytest.raises(RequestError, match="has no column label"):
        ListReader().list(ListRequest(str(tmp_path / "list.csv"), [], with_labels=True))


def test_labelled_images_are_pinned_with_their_reader(zip_reader: ZipReader, archive: Path, tmp_path: Path) -> None:
    images = read_labelled(str(archive), [])
    assert images.class_names() == ["even", "odd"]
    pin(str(tmp_path / "data"), "train", images)
    found = find_pinned(str(tmp_path / "data"), "train")
    assert found is not None
    assert found.reader is zip_reader
    assert found.table.equals(images.table)
    contents = {one.position: one.content for one in found.reader.read(found.rows(), 10**8)}
    assert len(contents) == NUM_IMAGES


class ClashingReader(ZipReader):
    """Reader that carries a column whose name is reserved."""

    def list(self, request: ListRequest) -> Listing:
        """List the inputs with a column called `prob`."""
        listing = super().list(request)
        names = ["prob" if name == "comment" else name for name in listing.table.column_names]
        return Listing(listing.table.rename_columns(names), 0)


def test_carried_column_with_a_reserved_name_is_refused(
    archive: Path, tmp_path: Path, ray_server: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[Reader] = [ClashingReader(), *registry._READERS]
    monkeypatch.setattr(registry, "_READERS", readers)
    with pytest.raises(RequestError, match="the input column 'prob' has the same name as an output column"):
        label(ray_server, archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_read_yields_each_row_once(folder: Path) -> None:
    rows = FilesReader().list(ListRequest(str(folder), [])).table
    results: Iterator[int] = (fetched.position for fetched in FilesReader().read(rows, 10**8))
    assert sorted(results) == list(range(NUM_IMAGES))
