"""File systems, bulk reads, listings and the manifest, on local disk and in an object store."""

import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.object_store import ObjectStore
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.errors import ItemError, RequestError
from pipelines.inputs import listing
from pipelines.inputs.listing import LISTING_SCHEMA, list_objects
from pipelines.inputs.manifest import MANIFEST_SCHEMA, find_manifest, write_manifest
from pipelines.outputs.writer import PartWriter
from pipelines.storage import bulk, filesystem, uris
from pipelines.storage.bulk import read_columns
from pipelines.storage.filesystem import exists, list_names, read_bytes, write_bytes
from tests.images.test_transform import IMAGENET
from tests.support.schemas import schema_of_parts

ODD_KEYS = (
    "with space.jpg",
    "100%.jpg",
    "a#b.jpg",
    "grün/ü.jpg",
    "emoji 🐈.jpg",
    "a+b&c=d.jpg",
    "deep/er/x.jpg",
    "no-suffix",
)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an empty folder on local disk or in the object store."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("store")
    return f"s3://scratch/{tmp_path.name}"


@pytest.mark.parametrize(
    ("uri", "normalized"),
    [
        ("s3://bucket/a/", "s3://bucket/a"),
        ("S3://bucket/A b", "s3://bucket/A b"),
        ("/a/../b/", "/b"),
        ("file:///a/b", "/a/b"),
        ("x", os.path.abspath("x")),
    ],
)
def test_uris_are_normalized(uri: str, normalized: str) -> None:
    assert uris.normalize(uri) == normalized


def test_contains_ignores_siblings_with_a_common_prefix() -> None:
    assert uris.contains("s3://b/in", "s3://b/in/out")
    assert uris.contains("/a", "/a/")
    assert not uris.contains("s3://b/in", "s3://b/in-2")


def test_written_objects_are_listed_and_read_back(root: str) -> None:
    for key in ODD_KEYS:
        write_bytes(uris.join(root, key), key.encode())
    table = list_objects(root, []).table
    assert table["uri"].to_pylist() == sorted(uris.join(root, key) for key in ODD_KEYS)
    assert table["size_bytes"].to_pylist() == [
        len(uri.removeprefix(f"{root}/").encode()) for uri in table["uri"].to_pylist()
    ]
    assert all(table["etag"].to_pylist())
    assert all(read_bytes(uris.join(root, key)) == key.encode() for key in ODD_KEYS)
    assert list_names(root) == sorted({key.partition("/")[0] for key in ODD_KEYS})


def test_fetch_many_returns_each_object_once_with_its_error(root: str) -> None:
    for key in ODD_KEYS:
        write_bytes(uris.join(root, key), key.encode())
    write_bytes(uris.join(root, "empty"), b"")
    write_bytes(uris.join(root, "large"), b"x" * 2000)
    wanted = [uris.join(root, key) for key in (*ODD_KEYS, "empty", "large", "absent")]
    found = {found.position: found.content for found in bulk.fetch_many(wanted, max_bytes=1000)}
    assert [found[position] for position in range(len(ODD_KEYS))] == [key.encode() for key in ODD_KEYS]
    kinds = [
        error.kind for position in range(len(ODD_KEYS), len(wanted)) if isinstance(error := found[position], ItemError)
    ]
    assert kinds == ["empty", "too_many_bytes", "not_found"]


def test_keys_that_no_file_system_allows_are_listed_and_read(store: ObjectStore) -> None:
    import s3fs

    client = s3fs.S3FileSystem()
    keys = ["odd/line\nbreak.jpg", "odd/tab\t.jpg", "odd/" + "/".join(["k" * 200] * 5)]
    for key in keys:
        client.call_s3("put_object", Bucket="scratch", Key=key, Body=key.encode())
    listed = list_objects("s3://scratch/odd", []).table["uri"].to_pylist()
    found = {found.position: found.content for found in bulk.fetch_many(listed, max_bytes=10_000)}
    assert [found[position] for position in range(len(listed))] == [
        uris.split_bucket(uri)[1].encode() for uri in listed
    ]
    assert len(listed) == len(keys)


def test_excluded_objects_are_counted(root: str) -> None:
    for key in ("a.jpg", "b.json", "thumbs/c.jpg"):
        write_bytes(uris.join(root, key), b"x")
    found = list_objects(root, ["*.json", "thumbs/*"])
    assert found.table["uri"].to_pylist() == [uris.join(root, "a.jpg")]
    assert found.num_excluded == 2
    with pytest.raises(RequestError, match="matches all 3 objects"):
        list_objects(root, ["*"])


def test_uri_of_one_object_lists_that_object_only(root: str) -> None:
    write_bytes(uris.join(root, "only.jpg"), b"x")
    write_bytes(uris.join(root, "only.jpg.txt"), b"x")
    assert list_objects(uris.join(root, "only.jpg"), []).table["uri"].to_pylist() == [uris.join(root, "only.jpg")]


def test_listing_of_many_prefixes_is_complete(root: str) -> None:
    keys = [f"{outer:02d}/{inner:02d}/{index}" for outer in range(4) for inner in range(30) for index in range(3)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: write_bytes(uris.join(root, key), b"x"), [*keys, "top"]))
    assert list_objects(root, []).table.num_rows == len(keys) + 1


@pytest.mark.parametrize("enough_prefixes", [1, 64])
def test_recursive_listing_equals_listing_by_level(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough_prefixes: int
) -> None:
    import s3fs

    # The root is listed by level, each prefix below it recursively: one with plain keys, one with a folder marker, and
    # one with a key that obstore cannot represent.
    monkeypatch.setattr(listing, "ENOUGH_PREFIXES", enough_prefixes)
    client, folder = s3fs.S3FileSystem(), tmp_path.name
    plain = [f"plain/{key}" for key in (*ODD_KEYS, "%41", "z")]
    kept = [*plain, "marked/a/x", "marked/empty", "odd/line\nbreak", "odd/x"]
    for key in (*kept, "marked/sub/"):
        body = b"" if key in ("marked/sub/", "marked/empty") else b"x"
        client.call_s3("put_object", Bucket="scratch", Key=f"{folder}/{key}", Body=body)
    found = list_objects(f"s3://scratch/{folder}", [])
    assert found.table["uri"].to_pylist() == sorted(f"s3://scratch/{folder}/{key}" for key in kept)
    assert found.num_excluded == 1
    assert found.table.schema.equals(LISTING_SCHEMA)
    sizes = dict(zip(found.table["uri"].to_pylist(), found.table["size_bytes"].to_pylist()))
    assert sizes[f"s3://scratch/{folder}/marked/empty"] == 0
    assert set(sizes.values()) == {0, 1}
    assert all(len(etag) == 32 for etag in found.table["etag"].to_pylist())


def test_flat_prefix_of_several_pages_is_listed_completely(store: ObjectStore, tmp_path: Path) -> None:
    root = f"s3://scratch/{tmp_path.name}"
    names = [f"{root}/{index:04d}" for index in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: bulk.store_object(name, b"x"), names))
    assert list_objects(root, []).table["uri"].to_pylist() == names
    assert list_objects(root, ["00*", "*9"]).num_excluded == 100 + 100


def test_listing_an_absent_folder_is_refused(root: str) -> None:
    assert not exists(uris.join(root, "absent"))
    with pytest.raises(RequestError, match=r"no input|does not exist"):
        list_objects(uris.join(root, "absent"), [])


def test_circular_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"x")
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    listed = list_objects(str(tmp_path / "data"), []).table["uri"].to_pylist()
    assert [Path(uri).name for uri in listed] == ["a", "gone"]


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(str(tmp_path / "x"), b"content")
    assert list(tmp_path.iterdir()) == []


def test_manifest_pins_the_inputs(root: str) -> None:
    for key in ("b", "a", "c"):
        write_bytes(uris.join(root, f"in/{key}"), key.encode())
    folder = uris.join(root, "out/_manifest")
    assert find_manifest(folder) is None
    found = list_objects(uris.join(root, "in"), ["c"])
    written = write_manifest(folder, uris.join(root, "in"), ["c"], found)
    write_bytes(uris.join(root, "in/later"), b"x")
    assert find_manifest(folder) == written
    table = written.table()
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table["id"].to_pylist() == [0, 1]
    assert [uri[-1] for uri in table["uri"].to_pylist()] == ["a", "b"]
    assert written.info.num_excluded == 1


def test_pickled_stages_contain_no_credentials(store: ObjectStore) -> None:
    # Use the store first, so that this process has credentials in memory.
    write_bytes("s3://scratch/pickled", b"x")
    assert list(bulk.fetch_many(["s3://scratch/pickled"], 10)) == [(0, b"x", 0)]
    stages = [
        FetchAndDecode(IMAGENET, 1, 1, "exact"),
        PartWriter("s3://scratch/out", schema_of_parts(5, 8), {"model": "x"}),
    ]
    for stage in stages:
        content = pickle.dumps(stage)
        assert store.secret_key.encode() not in content
        assert store.access_key.encode() not in content.replace(b"ecaray.", b"")


@pytest.mark.parametrize("uri", ["nosuch://bucket/key", "github://a", "hdfs://host/x", "memory2://x"])
def test_unsupported_protocols_are_refused(uri: str) -> None:
    with pytest.raises(RequestError, match=f"no file system for {uri}") as caught:
        filesystem.open_filesystem(uri)
    assert "\n" not in str(caught.value)


def test_fetched_images_keep_manifest_order(root: str, photographs: Path) -> None:
    paths = sorted(photographs.iterdir())[:5]
    for path in paths:
        write_bytes(uris.join(root, path.name), path.read_bytes())
    wanted = [uris.join(root, path.name) for path in paths] + [uris.join(root, "absent")]
    batch = pa.table({"id": pa.array(range(10, 16), pa.int64()), "uri": wanted})
    images = FetchAndDecode(IMAGENET, 10**8, 10**8, "exact")(batch)
    assert images["uri"].to_pylist() == wanted
    assert images["error_kind"].to_pylist() == [None] * 5 + ["not_found"]
    assert {len(image) for image in images["image"].to_pylist()[:5]} == {224 * 224 * 3}


@pytest.mark.parametrize("name", ["part-000000000000.parquet", "a b/ü.bin", "100%.bin", "large.bin"])
def test_stored_object_is_overwritten_and_read_back(store: ObjectStore, tmp_path: Path, name: str) -> None:
    content = os.urandom(12 * 1024**2 if name == "large.bin" else 1000)
    for folder in ("s3://scratch/stored", str(tmp_path)):
        bulk.store_object(uris.join(folder, name), content)
        bulk.store_object(uris.join(folder, name), content[::-1])
        assert read_bytes(uris.join(folder, name)) == content[::-1]


@pytest.mark.parametrize("name", ["table.parquet", "100%.parquet"])
def test_column_reads_fetch_only_those_columns(root: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(index) for index in range(5000)]
    table = pa.table({"id": range(5000), "uri": names, "embedding": [[0.5] * 64] * 5000})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=False, compression=None)
    write_bytes(uris.join(root, name), buffer.getvalue())
    requested: list[int] = []
    get_range = obstore.get_range

    def count_bytes(store: Any, path: str, *, start: int, end: int) -> Any:
        requested.append(end - start)
        return get_range(store, path, start=start, end=end)

    monkeypatch.setattr(obstore, "get_range", count_bytes)
    assert read_columns(uris.join(root, name), ["id", "uri"]).equals(table.select(["id", "uri"]))
    assert sum(requested) < len(buffer.getvalue()) / 3
    assert (len(requested) > 0) == (root.startswith("s3://") and name == "table.parquet")
