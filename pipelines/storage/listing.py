"""All objects under a URI, listed in parallel.

A store's listing is sequential within a prefix (each page names the next), so the tree is opened breadth first until
there are enough prefixes to keep the workers busy; each of those is then listed whole.
"""

import fnmatch
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.filesystem import in_plain_words, open_filesystem

NUM_WORKERS = 16
# Four prefixes a worker even out prefixes of different size.
ENOUGH_PREFIXES = 4 * NUM_WORKERS

LISTING_SCHEMA = pa.schema([("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])

Entry = tuple[str, int, str]
"""URI, size in bytes, etag."""


@dataclass(frozen=True)
class Listing:
    """What lies under a URI: a table of `LISTING_SCHEMA` sorted by URI, and how many objects were left out."""

    table: pa.Table
    num_excluded: int


def list_objects(uri: str, exclude: list[str]) -> Listing:
    """List every object under `uri`, or `uri` itself where it is one object.

    Args:
        uri: normalized folder, prefix or object.
        exclude: shell patterns on the path below `uri`; objects that match one are counted, not listed.

    Raises:
        RequestError: there is nothing to read, or the store refuses.
    """
    with in_plain_words("list", uri):
        entries = list(_entries(uri))
    if not entries:
        raise RequestError(f"no input: nothing lies under {uri}")
    kept = [entry for entry in entries if not _is_excluded(entry, uri, exclude)]
    if not kept:
        raise RequestError(f"no input: input.exclude leaves none of the {len(entries)} objects under {uri}")
    columns = [pa.array(column, field.type) for column, field in zip(zip(*kept), LISTING_SCHEMA)]
    table = pa.Table.from_arrays(columns, schema=LISTING_SCHEMA)
    return Listing(table.take(pc.sort_indices(table, [("uri", "ascending")])), len(entries) - len(kept))


def _is_excluded(entry: Entry, root: str, patterns: list[str]) -> bool:
    uri, size_bytes, _ = entry
    if uri.endswith("/") and size_bytes == 0:
        return True  # what object-store consoles write to show an empty folder
    path = uri.removeprefix(root).lstrip("/") or uri.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _entries(uri: str) -> Iterator[Entry]:
    if uris.is_local(uri):
        return _local_entries(uri)
    if uris.protocol_of(uri) == "s3":
        return _s3_entries(uri)
    return _fsspec_entries(uri)


def _local_entries(path: str) -> Iterator[Entry]:
    if not os.path.isdir(path):
        yield _local_entry(path, os.stat(path))
        return
    pending, seen = [path], {os.path.realpath(path)}
    while pending:
        with os.scandir(pending.pop()) as children:
            for child in children:
                if child.is_dir():
                    target = os.path.realpath(child.path)
                    if target not in seen:  # a link may lead back up
                        seen.add(target)
                        pending.append(child.path)
                elif child.is_file():
                    yield _local_entry(child.path, child.stat())
                elif child.is_symlink():
                    yield _as_text(child.path), 0, ""  # a dangling link: fails when it is fetched, and is counted


def _local_entry(path: str, stat: os.stat_result) -> Entry:
    return _as_text(path), stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


def _as_text(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise RequestError(f"the file name {os.fsencode(path)!r} is not UTF-8, so no table can hold it") from None
    return path


def _fsspec_entries(uri: str) -> Iterator[Entry]:
    filesystem, path = open_filesystem(uri)
    for name, info in filesystem.find(path, detail=True).items():
        etag = info.get("etag") or info.get("ETag") or info.get("mtime") or ""
        yield filesystem.unstrip_protocol(name), int(info.get("size") or 0), str(etag)


def _s3_entries(uri: str) -> Iterator[Entry]:
    bucket, key = uris.split_bucket(uri)
    lister = _S3Lister(bucket)
    found = list(lister.entries(f"{key}/" if key else ""))
    return iter(found or lister.one_object(key))


class _S3Lister:
    """Lists one bucket with the client that s3fs holds."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.filesystem, _ = open_filesystem(f"s3://{bucket}")

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Every object under `prefix`, in no particular order."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            level = [prefix]
            while level and len(level) < ENOUGH_PREFIXES:
                opened = list(pool.map(self._open_level, level))
                for objects, _ in opened:
                    yield from objects
                level = [prefix for _, prefixes in opened for prefix in prefixes]
            for objects in pool.map(self._list_whole, level):
                yield from objects

    def one_object(self, key: str) -> list[Entry]:
        """The object called `key` itself, if there is one."""
        objects, _ = self._list(key, MaxKeys=1)
        return [entry for entry in objects if key and entry[0] == f"s3://{self.bucket}/{key}"]

    def _open_level(self, prefix: str) -> tuple[list[Entry], list[str]]:
        return self._list(prefix, Delimiter="/")

    def _list_whole(self, prefix: str) -> list[Entry]:
        return self._list(prefix)[0]

    def _list(self, prefix: str, **options: str | int) -> tuple[list[Entry], list[str]]:
        objects: list[Entry] = []
        prefixes: list[str] = []
        token: dict[str, str] = {}
        while True:
            page = self.filesystem.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=prefix, **options, **token)
            objects += [
                (f"s3://{self.bucket}/{item['Key']}", item["Size"], item.get("ETag", "").strip('"'))
                for item in page.get("Contents", [])
            ]
            prefixes += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            if not page.get("IsTruncated") or "MaxKeys" in options:
                return objects, prefixes
            token = {"ContinuationToken": page["NextContinuationToken"]}
