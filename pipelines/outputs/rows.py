"""Reads of the rows of an output, shared by all jobs."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from pipelines.errors import RequestError
from pipelines.outputs.contents import FILE_ADVICE, list_committed
from pipelines.outputs.file_names import is_failed
from pipelines.storage import uris
from pipelines.storage.tables import read_own_schema, read_own_table

# Number of files read ahead of the caller. A compacted file has 64 to 256 MB.
NUM_READ_AHEAD = 2
NUM_READERS = 8
DEFAULT_BATCH_ROWS = 16_384


def read_table(output_uri: str, columns: list[str] | None, failed: bool) -> pa.Table:
    """Return the rows of an output. See `Output.table` for arguments and errors."""
    names, wanted = _files_and_columns(output_uri, columns, failed)
    with_id = [*wanted, "id"] if "id" not in wanted else wanted
    with ThreadPoolExecutor(NUM_READERS) as pool:
        tables = list(pool.map(lambda name: _read_file(output_uri, name, with_id), names))
    if not tables:
        return pa.table({name: pa.array([], pa.null()) for name in wanted})
    return pa.concat_tables(tables).sort_by("id").select(wanted)


def read_batches(output_uri: str, columns: list[str] | None, batch_rows: int, failed: bool) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an output in batches. See `Output.batches` for arguments and errors."""
    names, wanted = _files_and_columns(output_uri, columns, failed)
    with ThreadPoolExecutor(NUM_READ_AHEAD) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        for name in names:
            ahead.append(pool.submit(_read_file, output_uri, name, wanted))
            if len(ahead) > NUM_READ_AHEAD:
                yield from ahead.popleft().result().to_batches(max_chunksize=batch_rows)
        for table in ahead:
            yield from table.result().to_batches(max_chunksize=batch_rows)


def _files_and_columns(output_uri: str, columns: list[str] | None, failed: bool) -> tuple[list[str], list[str]]:
    names = [name for name in list_committed(output_uri) if is_failed(name) == failed]
    if not names:
        return [], columns or []
    known = read_own_schema(uris.join(output_uri, names[0]), FILE_ADVICE).names
    unknown = [column for column in columns or [] if column not in known]
    if unknown:
        raise RequestError(f"{output_uri} has no column {unknown[0]!r}; it has: {', '.join(known)}")
    return names, columns or known


def _read_file(output_uri: str, name: str, columns: list[str]) -> pa.Table:
    return read_own_table(uris.join(output_uri, name), columns, FILE_ADVICE)
