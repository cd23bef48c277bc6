"""The manifest: the inputs of one output, listed once and pinned under it, so that a rerun never lists again.

`_manifest/part-*.parquet` hold the rows; `_manifest/manifest.json` is written last and makes them count.
"""

import functools
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.bulk import read_columns
from pipelines.storage.filesystem import read_bytes, write_bytes
from pipelines.storage.listing import Listing

MANIFEST_SCHEMA = pa.schema(
    [("id", pa.int64()), ("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())]
)
# A task reads a whole file of them for its few rows, and keeps it for the next task of its process.
ROWS_PER_FILE = 250_000
NUM_READERS = 8


@dataclass(frozen=True)
class ManifestInfo:
    """What `_manifest/manifest.json` holds."""

    input_uri: str
    exclude: list[str]
    num_inputs: int
    num_excluded: int
    num_files: int
    rows_per_file: int


def find_manifest(output_uri: str) -> ManifestInfo | None:
    """What the manifest of an output says of itself; None where none was finished."""
    try:
        return ManifestInfo(**json.loads(read_bytes(_info_uri(output_uri))))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError):
        raise RequestError(f"{_info_uri(output_uri)} is damaged: it is not what a job wrote there") from None


def write_manifest(output_uri: str, input_uri: str, exclude: list[str], listing: Listing) -> ManifestInfo:
    """Pin the inputs: ids dense from 0, in the order of the URIs.

    Args:
        output_uri: where `_manifest/` goes.
        input_uri: what was listed.
        exclude: the shell patterns that it was listed with.
        listing: what was found.
    """
    num_inputs = listing.table.num_rows
    table = listing.table.add_column(0, MANIFEST_SCHEMA.field("id"), pa.array(range(num_inputs), pa.int64()))
    num_files = -(-num_inputs // ROWS_PER_FILE)
    for index in range(num_files):
        buffer = io.BytesIO()
        pq.write_table(table.slice(index * ROWS_PER_FILE, ROWS_PER_FILE), buffer, compression="zstd")
        write_bytes(_file_uri(output_uri, index), buffer.getvalue())
    info = ManifestInfo(input_uri, exclude, num_inputs, listing.num_excluded, num_files, ROWS_PER_FILE)
    write_bytes(_info_uri(output_uri), json.dumps(asdict(info), indent=2).encode())
    return info


def read_manifest(output_uri: str, info: ManifestInfo) -> pa.Table:
    """All rows, `MANIFEST_SCHEMA`, in the order of their ids."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        names = [_file_uri(output_uri, index) for index in range(info.num_files)]
        tables = pool.map(lambda name: pq.read_table(pa.BufferReader(read_bytes(name))), names)
        return pa.concat_tables(tables)


def read_manifest_rows(output_uri: str, ids: NDArray[np.int64], rows_per_file: int) -> pa.Table:
    """`id` and `uri` of some ids, given in order.

    Args:
        output_uri: the output.
        ids: of its manifest.
        rows_per_file: of the manifest.
    """
    files = ids // rows_per_file
    rows = [_cached_file(output_uri, int(file)).take(ids[files == file] % rows_per_file) for file in np.unique(files)]
    return pa.concat_tables(rows).combine_chunks()


# Tasks come in the order of their ids: one file after the other is read, once in each process.
@functools.lru_cache(maxsize=2)
def _cached_file(output_uri: str, index: int) -> pa.Table:
    return read_columns(_file_uri(output_uri, index), ["id", "uri"])


def _info_uri(output_uri: str) -> str:
    return uris.join(output_uri, "_manifest/manifest.json")


def _file_uri(output_uri: str, index: int) -> str:
    return uris.join(output_uri, f"_manifest/part-{index:05d}.parquet")
