"""Manifest: the inputs of an output, listed once and pinned under it, so that a rerun does not list again.

The rows are in `_manifest/inputs-*.parquet`. `_manifest/manifest.json` is created last, by a conditional write: if two
runs list at the same time, only one manifest takes effect.
"""

import functools
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipelines.errors import DamagedFileError, RequestError
from pipelines.inputs.reader import Listing, Reader
from pipelines.inputs.registry import reader_named
from pipelines.storage import uris
from pipelines.storage.conditional import create_object
from pipelines.storage.documents import Document, read_document, to_json
from pipelines.storage.filesystem import write_bytes
from pipelines.storage.tables import read_own_schema, read_own_table

MANIFEST_SCHEMA = pa.schema(
    [("id", pa.int64()), ("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())]
)
# A task reads a whole file to get its few rows, and caches it for the next task in its process.
ROWS_PER_FILE = 250_000
NUM_READERS = 8
Result = TypeVar("Result")
ADVICE = "restore it from a backup, or write to a new output; without it, the ids in this output mean nothing"


class ManifestInfo(Document):
    """Content of `_manifest/manifest.json`.

    Attributes:
        input_uri: URI that was listed.
        exclude: Shell patterns of objects that were excluded.
        num_inputs: Number of rows in the manifest.
        num_excluded: Number of objects that were excluded.
        num_files: Number of files that hold the rows.
        rows_per_file: Number of rows per file, except the last.
        file_prefix: Prefix of the file names.
        reader: Name of the reader that listed the inputs.
    """

    newest_format: ClassVar[int] = 3

    input_uri: str
    exclude: list[str]
    num_inputs: Annotated[int, Field(ge=0)]
    num_excluded: Annotated[int, Field(ge=0)]
    num_files: Annotated[int, Field(ge=0)]
    rows_per_file: Annotated[int, Field(ge=1)]
    file_prefix: Annotated[str, Field(pattern=r"^[a-z]+-([0-9]+-)?$")] = "part-"
    reader: str = "files"

    @model_validator(mode="after")
    def _files_hold_the_rows(self) -> "ManifestInfo":
        if self.num_files != -(-self.num_inputs // self.rows_per_file):
            raise ValueError("num_files does not match num_inputs and rows_per_file")
        return self


@dataclass(frozen=True)
class Manifest:
    """Pinned inputs of an output.

    Attributes:
        folder_uri: URI of the folder that contains its files.
        info: Content of `manifest.json`.
    """

    folder_uri: str
    info: ManifestInfo

    @property
    def num_inputs(self) -> int:
        """Number of inputs."""
        return self.info.num_inputs

    @property
    def reader(self) -> Reader:
        """Reader that listed the inputs.

        Raises:
            RequestError: This version of ecaray does not have that reader.
        """
        return reader_named(self.info.reader)

    @functools.cached_property
    def carried(self) -> pa.Schema:
        """Schema of the columns that are carried to the output.

        Raises:
            DamagedFileError: A file is damaged or missing.
        """
        if not self.info.num_files:
            return pa.schema([])
        schema = _read(read_own_schema, _file_uri(self.folder_uri, self.info, 0))
        others = {*MANIFEST_SCHEMA.names, *self.reader.locators}
        return pa.schema([field for field in schema if field.name not in others])

    def table(self) -> pa.Table:
        """Read all rows in order of id: the columns of `MANIFEST_SCHEMA`, the locators and the carried columns.

        Raises:
            DamagedFileError: A file is damaged or missing, or the files do not hold `num_inputs` rows.
        """
        with ThreadPoolExecutor(NUM_READERS) as pool:
            files = [_file_uri(self.folder_uri, self.info, index) for index in range(self.info.num_files)]
            table = pa.concat_tables(pool.map(_read_file, files))
        if table.num_rows != self.num_inputs:
            raise DamagedFileError(
                f"{_info_uri(self.folder_uri)} is damaged (num_inputs is {self.num_inputs}, but its files "
                f"contain {table.num_rows} rows): {ADVICE}"
            )
        return table

    def rows(self, ids: NDArray[np.int64]) -> pa.Table:
        """Read the rows of some ids, with all columns but `size_bytes`.

        Args:
            ids: Ids in ascending order, shape `(num_rows,)`.

        Raises:
            DamagedFileError: A file is damaged or missing.
        """
        files = ids // self.info.rows_per_file
        rows = [
            _cached_file(_file_uri(self.folder_uri, self.info, int(file))).take(
                ids[files == file] % self.info.rows_per_file
            )
            for file in np.unique(files)
        ]
        return pa.concat_tables(rows).combine_chunks()


def find_manifest(folder_uri: str) -> Manifest | None:
    """Return the manifest in a folder, or None if no run finished writing one.

    Raises:
        DamagedFileError: The manifest is damaged.
    """
    try:
        return Manifest(folder_uri, read_document(_info_uri(folder_uri), ManifestInfo, ADVICE))
    except FileNotFoundError:
        return None


def write_manifest(
    folder_uri: str,
    input_uri: str,
    exclude: list[str],
    listing: Listing,
    epoch: int = 0,
    reader: str = "files",
) -> Manifest:
    """Pin the inputs, with consecutive ids from 0 in the order of the listing.

    Args:
        folder_uri: URI of the folder that receives the files.
        input_uri: URI that was listed.
        exclude: Shell patterns of objects that were excluded.
        listing: Inputs that were found.
        epoch: Epoch of the run's lease.
        reader: Name of the reader that listed the inputs.

    Raises:
        RequestError: Another run pinned its inputs at the same time.
    """
    num_inputs = listing.table.num_rows
    table = listing.table.add_column(0, MANIFEST_SCHEMA.field("id"), pa.array(range(num_inputs), pa.int64()))
    num_files = -(-num_inputs // ROWS_PER_FILE)
    info = ManifestInfo(
        format=ManifestInfo.newest_format,
        input_uri=input_uri,
        exclude=exclude,
        num_inputs=num_inputs,
        num_excluded=listing.num_excluded,
        num_files=num_files,
        rows_per_file=ROWS_PER_FILE,
        file_prefix=f"inputs-{epoch:06d}-",
        reader=reader,
    )
    for index in range(num_files):
        buffer = io.BytesIO()
        pq.write_table(table.slice(index * ROWS_PER_FILE, ROWS_PER_FILE), buffer, compression="zstd")
        write_bytes(_file_uri(folder_uri, info, index), buffer.getvalue())
    manifest = Manifest(folder_uri, info)
    if not create_object(_info_uri(folder_uri), to_json(info)) and find_manifest(folder_uri) != manifest:
        raise RequestError(f"another run pinned its inputs in {folder_uri} first: run the same command again")
    return manifest


# Tasks arrive in order of id, so each process reads one file after the other, once.
@functools.lru_cache(maxsize=2)
def _cached_file(uri: str) -> pa.Table:
    return _read_file(uri).drop_columns(["size_bytes"])


def _read_file(uri: str) -> pa.Table:
    table = _read(lambda uri, advice: read_own_table(uri, None, advice), uri)
    if missing := set(MANIFEST_SCHEMA.names) - set(table.column_names):
        raise DamagedFileError(f"{uri} is damaged (no column {min(missing)!r}): {ADVICE}")
    return table


def _read(read: Callable[[str, str], Result], uri: str) -> Result:
    try:
        return read(uri, ADVICE)
    except FileNotFoundError:
        raise DamagedFileError(f"{uri} is missing: {ADVICE}") from None


def _info_uri(folder_uri: str) -> str:
    return uris.join(folder_uri, "manifest.json")


def _file_uri(folder_uri: str, info: ManifestInfo, index: int) -> str:
    return uris.join(folder_uri, f"{info.file_prefix}{index:05d}.parquet")
