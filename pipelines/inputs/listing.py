"""Parallel listing of all objects under a URI.

A store lists a prefix sequentially (each page holds the token of the next). The prefix tree is therefore expanded
breadth first until there are enough prefixes to keep the workers busy, and each of those is then listed recursively.
"""

import fnmatch
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import obstore
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import InvalidPathError

from pipelines.errors import RequestError
from pipelines.inputs.local_listing import Entry, LocalLister, entry_of
from pipelines.inputs.reader import Listing
from pipelines.storage import s3, uris
from pipelines.storage.bulk import is_obstore_path
from pipelines.storage.filesystem import etag_of_entry, open_filesystem, translate_storage_errors

log = logging.getLogger(__name__)

NUM_WORKERS = 16
# Four prefixes per worker balance prefixes of different sizes.
ENOUGH_PREFIXES = 4 * NUM_WORKERS
# obstore itself retries single pages. A retry by `Retries` would start a listing of a million keys over.
NUM_RETRIES = 10
ROWS_PER_CHUNK = 10_000

LISTING_SCHEMA = pa.schema([("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])


def list_objects(uri: str, exclude: list[str]) -> Listing:
    """List every object under `uri`, or `uri` itself if it is a single object.

    Args:
        uri: Normalized URI of a folder, prefix or object.
        exclude: Shell patterns on the path below `uri`. Objects that match one are counted, not listed. A pattern that
            matches nothing causes a warning.

    Raises:
        RequestError: There is nothing to read, or the store fails.
    """
    exclusion = _Exclusion(exclude)
    folder = LocalLister(uri, exclusion.matches) if uris.is_local(uri) and os.path.isdir(uri) else None
    with translate_storage_errors("list", uri):
        found = list(_in_tables(folder.entries()) if folder else _tables(uri))
    num_found = sum(table.num_rows for table in found)
    if not num_found:
        raise RequestError(f"no input: nothing found under {uri}")
    kept = pa.concat_tables([_without_excluded(found.pop(0), uri, exclusion) for _ in range(len(found))])
    for pattern in exclusion.unused():
        log.warning("exclude: the pattern %r matches nothing under %s", pattern, uri)
    if not kept.num_rows:
        raise RequestError(f"no input: input.exclude matches all {num_found} objects under {uri}")
    return Listing(_sorted(kept), num_found - kept.num_rows, folder.followed if folder else {})


class _Exclusion:
    """Shell patterns on paths below the input. It records which patterns have matched."""

    def __init__(self, patterns: list[str]) -> None:
        self._compiled = {pattern: re.compile(fnmatch.translate(pattern)) for pattern in patterns}
        self._used: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._compiled)

    def matches(self, below: str) -> bool:
        """Return whether any pattern matches the path `below` the input."""
        matching = [pattern for pattern, compiled in self._compiled.items() if compiled.match(below)]
        self._used.update(matching)
        return bool(matching)

    def unused(self) -> list[str]:
        """Return the patterns that have matched nothing so far."""
        return [pattern for pattern in self._compiled if pattern not in self._used]


def _sorted(table: pa.Table) -> pa.Table:
    """Sort a table by URI. A table that is already sorted, as from most stores, is returned without a copy."""
    names = table["uri"]
    if pc.all(pc.less_equal(names.slice(0, len(names) - 1), names.slice(1))).as_py() is not False:
        return table
    return table.take(pc.sort_indices(table, [("uri", "ascending")]))


def _without_excluded(table: pa.Table, root: str, exclusion: _Exclusion) -> pa.Table:
    # Object-store consoles create an empty object with a trailing slash to show an empty folder.
    is_folder_marker = pc.and_(pc.ends_with(table["uri"], "/"), pc.equal(table["size_bytes"], 0))
    table = table.filter(pc.invert(is_folder_marker))
    if not exclusion:
        return table
    kept = [not exclusion.matches(_below(uri, root)) for uri in table["uri"].to_pylist()]
    return table.filter(pa.array(kept, pa.bool_()))


def _below(uri: str, root: str) -> str:
    return uri.removeprefix(root).lstrip("/") or uri.rpartition("/")[2]


def _tables(uri: str) -> Iterator[pa.Table]:
    if uris.protocol_of(uri) == "s3":
        return _s3_tables(uri)
    return _in_tables([_local_file(uri)] if uris.is_local(uri) else _fsspec_entries(uri))


def _in_tables(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    rest = iter(entries)
    while chunk := list(islice(rest, ROWS_PER_CHUNK)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*chunk), LISTING_SCHEMA)]
        yield pa.Table.from_arrays(columns, schema=LISTING_SCHEMA)


def _local_file(path: str) -> Entry:
    return entry_of(uris.as_text(path), os.stat(path))


def _fsspec_entries(uri: str) -> Iterator[Entry]:
    filesystem, path = open_filesystem(uri)
    for name, info in filesystem.find(path, detail=True).items():
        yield filesystem.unstrip_protocol(name), int(info.get("size") or 0), etag_of_entry(info)


def _s3_tables(uri: str) -> Iterator[pa.Table]:
    bucket, key = uris.split_bucket(uri)
    lister = _S3Lister(bucket)
    is_empty = True
    for table in lister.tables(f"{key}/" if key else ""):
        is_empty = False
        yield table
    if is_empty:
        yield from _in_tables(lister.one_object(key))


class _S3Lister:
    """Lister of one bucket. It lists single levels with the botocore client of s3fs, and whole prefixes with obstore.

    obstore reads a page in a tenth of the time, but its paths are not keys: it cannot represent some keys, and shows
    a folder marker (an empty object whose key ends in a slash) without the slash. Prefixes that may contain either are
    listed with botocore.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.filesystem, _ = open_filesystem(f"s3://{bucket}")

    def tables(self, prefix: str) -> Iterator[pa.Table]:
        """Yield every object under `prefix`, in order if all are equally deep."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            level = [prefix]
            while level and len(level) < ENOUGH_PREFIXES:
                listed = list(pool.map(self._list_level, level))
                yield from (table for tables, _ in listed for table in tables)
                level = [prefix for _, prefixes in listed for prefix in prefixes]
            for tables in pool.map(self._list_recursively, level):
                yield from tables

    def one_object(self, key: str) -> list[Entry]:
        """Return the object with exactly this key, or an empty list if there is none."""
        page = self._list_page(key, MaxKeys=1)
        return [entry for entry in page.objects if key and entry[0] == f"s3://{self.bucket}/{key}"]

    def _list_level(self, prefix: str) -> tuple[list[pa.Table], list[str]]:
        page = self._list_page(prefix, Delimiter="/")
        if page.next_page and not page.prefixes:
            return self._list_recursively(prefix), []  # a flat prefix of thousands of objects has no tree to expand
        objects, prefixes = page.objects, page.prefixes
        while page.next_page:
            page = self._list_page(prefix, Delimiter="/", **page.next_page)
            objects += page.objects
            prefixes += page.prefixes
        return list(_in_tables(objects)), prefixes

    def _list_recursively(self, prefix: str) -> list[pa.Table]:
        folder = prefix.removesuffix("/")
        found = self._list_with_obstore(folder) if not prefix or is_obstore_path(folder) else None
        return list(_in_tables(self._list_pages(prefix))) if found is None else found

    def _list_with_obstore(self, folder: str) -> list[pa.Table] | None:
        return s3.in_region_of_bucket(lambda: self._tables_of_obstore(folder))

    def _tables_of_obstore(self, folder: str) -> list[pa.Table] | None:
        store = s3.s3_store(self.bucket, num_retries=NUM_RETRIES)
        tables: list[pa.Table] = []
        try:
            for batch in obstore.list(store, prefix=folder or None, chunk_size=ROWS_PER_CHUNK, return_arrow=True):
                tables.append(self._from_obstore(pa.table(batch)))
                if pc.any(pc.equal(tables[-1]["size_bytes"], 0)).as_py():
                    return None
        except InvalidPathError:
            return None
        return tables

    def _from_obstore(self, batch: pa.Table) -> pa.Table:
        columns = [
            pc.binary_join_element_wise(f"s3://{self.bucket}", batch["path"].cast(pa.string()), "/"),
            batch["size"].cast(pa.int64()),
            pc.utf8_trim(pc.fill_null(batch["e_tag"].cast(pa.string()), ""), characters='"'),
        ]
        return pa.Table.from_arrays(columns, schema=LISTING_SCHEMA)

    def _list_pages(self, prefix: str) -> Iterator[Entry]:
        page = self._list_page(prefix)
        yield from page.objects
        while page.next_page:
            page = self._list_page(prefix, **page.next_page)
            yield from page.objects

    def _list_page(self, prefix: str, **options: str | int) -> "_Page":
        found = self.filesystem.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=prefix, **options)
        objects = [
            (f"s3://{self.bucket}/{item['Key']}", item["Size"], item.get("ETag", "").strip('"'))
            for item in found.get("Contents", [])
        ]
        prefixes = [item["Prefix"] for item in found.get("CommonPrefixes", [])]
        has_more = found.get("IsTruncated") and "MaxKeys" not in options
        return _Page(objects, prefixes, {"ContinuationToken": found["NextContinuationToken"]} if has_more else {})


class _Page(NamedTuple):
    """Page of a listing.

    Attributes:
        objects: Objects on the page.
        prefixes: Common prefixes on the page, if one level was listed.
        next_page: Options that request the next page; empty on the last page.
    """

    objects: list[Entry]
    prefixes: list[str]
    next_page: dict[str, str]
