"""The manifest: the inputs of one output, listed once and pinned under it, so that a rerun never lists again.

`_manifest/inputs-*.parquet` hold the rows. `_manifest/manifest.json` is created last, by a conditional write: of two
runs that list at the same time, the manifest of one counts.
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
# A task reads a whole file of them for its few rows, and keeps it for the next task of its process.
ROWS_PER_FILE = 250_000
NUM_READERS = 8
Result = TypeVar("Result")
ADVICE = "restore it from a copy, or write to a new output; the rows of this one cannot be told apart without it"


class ManifestInfo(Document):
    """Content of `_manifest/manifest.json`.

    Attributes:
        input_uri: what was listed.
        exclude: the shell patterns that it was listed with.
        num_inputs: rows of the manifest.
        num_excluded: objects that the patterns left out.
        num_files: files that hold the rows.
        rows_per_file: rows of each, but of the last.
        file_prefix: beginning of the files' names.
        reader: name of the reader that listed the inputs.
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
            raise ValueError("num_files does not follow from num_inputs and rows_per_file")
        return self


@dataclass(frozen=True)
class Manifest:
    """The pinned inputs of one output.

    Attributes:
        folder_uri: of its files.
        info: what it says of itself.
    """

    folder_uri: str
    info: ManifestInfo

    @property
    def num_inputs(self) -> int:
        """Number of rows."""
        return self.info.num_inputs

    @property
    def reader(self) -> Reader:
        """The reader that listed the inputs.

        Raises:
            RequestError: this version does not know it.
        """
        return reader_named(self.info.reader)

    @functools.cached_property
    def carried(self) -> pa.Schema:
        """Columns that are carried to the output.

        Raises:
            DamagedFileError: a file is damaged or gone.
        """
        if not self.info.num_files:
            return pa.schema([])
        schema = _read(read_own_schema, _file_uri(self.folder_uri, self.info, 0))
        others = {*MANIFEST_SCHEMA.names, *self.reader.locators}
        return pa.schema([field for field in schema if field.name not in others])

    def table(self) -> pa.Table:
        """Read all rows, `MANIFEST_SCHEMA` and the further columns, in the order of their ids.

        Raises:
            DamagedFileError: a file is damaged or gone.
        """
        with ThreadPoolExecutor(NUM_READERS) as pool:
            files = [_file_uri(self.folder_uri, self.info, index) for index in range(self.info.num_files)]
            return pa.concat_tables(pool.map(_read_file, files))

    def rows(self, ids: NDArray[np.int64]) -> pa.Table:
        """Read some rows: all columns but `size_bytes`.

        Args:
            ids: in order.

        Raises:
            DamagedFileError: a file is damaged or gone.
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
    """Return the manifest that lies in a folder; None where none was finished.

    Raises:
        DamagedFileError: it is damaged.
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
    """Pin the inputs: ids dense from 0, in the order of the listing.

    Args:
        folder_uri: where the files go.
        input_uri: what was listed.
        exclude: the shell patterns that it was listed with.
        listing: what was found.
        epoch: of the run's lease.
        reader: name of the reader that listed them.

    Raises:
        RequestError: another run pinned its inputs meanwhile.
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
        raise RequestError(f"another run pinned its inputs in {folder_uri} meanwhile: run the same command again")
    return manifest


# Tasks come in the order of their ids: one file after the other is read, once in each process.
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
        raise DamagedFileError(f"{uri} is gone: {ADVICE}") from None


def _info_uri(folder_uri: str) -> str:
    return uris.join(folder_uri, "manifest.json")


def _file_uri(folder_uri: str, info: ManifestInfo, index: int) -> str:
    return uris.join(folder_uri, f"{info.file_prefix}{index:05d}.parquet")
