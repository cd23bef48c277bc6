"""Write: predictions to Parquet files, each whole or not there. Rows N:1, a write_result for each batch."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import RunError
from pipelines.outputs import schema as schemas
from pipelines.outputs.commit_log import withdraw_if_over
from pipelines.outputs.file_names import Kind, file_name
from pipelines.outputs.lease import Fence
from pipelines.outputs.reasons import reasons_of
from pipelines.outputs.schema import WRITE_RESULTS
from pipelines.runtime import metrics
from pipelines.storage import uris
from pipelines.storage.bulk import store_object
from pipelines.storage.filesystem import translate_storage_errors

# With an embedding, 8 KB a row: what a reader that wants a few rows has to read.
ROWS_PER_GROUP = 16_384


@dataclass(frozen=True)
class PartWriter:
    """Writes batches of predictions under one output.

    Attributes:
        output_uri: where the files go.
        parts_schema: of the good rows.
        failed_schema: of the failed rows.
        metadata: key-value metadata of each file.
        fence: of the run's lease; None for files that no lease protects.
    """

    output_uri: str
    parts_schema: pa.Schema
    metadata: dict[str, str]
    fence: Fence | None = None
    failed_schema: pa.Schema = field(default_factory=schemas.failed_schema)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One batch to `part-*.parquet` and, where images failed, `failed-*.parquet`; returns `WRITE_RESULTS`."""
        is_good = pc.is_null(batch["error_kind"])
        good = batch.filter(is_good).select(self.parts_schema.names).cast(self.parts_schema)
        failed = batch.filter(pc.invert(is_good)).select(self.failed_schema.names).cast(self.failed_schema)
        with metrics.timed("write"):
            tables: tuple[tuple[Kind, pa.Table], ...] = (("part", good), ("failed", failed))
            written = [self._write(kind, table) for kind, table in tables if table.num_rows]
        num_retries = pc.sum(batch["num_retries"]).as_py() + sum(file.num_retries for file in written)
        metrics.count("ecaray_images", good.num_rows, status="ok")
        metrics.count("ecaray_images", failed.num_rows, status="failed")
        metrics.count("ecaray_requests_sent_again", num_retries)
        names, digests = [file.name for file in written], [file.digest for file in written]
        # Rows that no decoder made, as a benchmark's, have no such column.
        num_clipped = batch["is_clipped"].to_pylist().count(True) if "is_clipped" in batch.column_names else 0
        columns = [[good.num_rows], [reasons_of(failed)], [names], [digests], [num_retries], [num_clipped]]
        return pa.table(columns, schema=WRITE_RESULTS)

    def _write(self, kind: Kind, table: pa.Table) -> "Written":
        name = file_name(kind, pc.min(table["id"]).as_py(), self.fence.epoch if self.fence else 0)
        return write_table(self.output_uri, name, table, table.schema.with_metadata(self.metadata), self.fence)


class Written(NamedTuple):
    """A file, its SHA-256, and the attempts at storing it before the last one."""

    name: str
    digest: str
    num_retries: int


def write_table(output_uri: str, name: str, table: pa.Table, schema: pa.Schema, fence: Fence | None = None) -> Written:
    """Write a Parquet file, sorted by id.

    Args:
        output_uri: where it goes.
        name: of the file.
        table: its rows, of types that can be cast to those of the schema.
        schema: of the file, with its metadata.
        fence: of the run's lease; None for a file that no lease protects.

    Raises:
        LeaseLostError: the lease is over. The file is not written, or is removed again unless the run that has the
            lease now counts it.
        RunError: the store refuses it or has no room; names the file.
    """
    table = table.sort_by("id")
    buffer = io.BytesIO()
    # Floats of an embedding hardly repeat: a dictionary would only cost time and space.
    dictionary = [name for name in ("index", "label", "error_kind", "error_message") if name in table.column_names]
    with pq.ParquetWriter(buffer, schema, compression="zstd", use_dictionary=_leaf_paths(schema, dictionary)) as writer:
        for start in range(0, table.num_rows, ROWS_PER_GROUP):
            writer.write_table(table.slice(start, ROWS_PER_GROUP).cast(schema))
    metrics.count("ecaray_written_bytes", buffer.tell())
    uri, content = uris.join(output_uri, name), buffer.getvalue()
    with translate_storage_errors("write", uri, RunError):
        num_retries = store_object(uri, content, check=fence.check if fence else None)
    if fence:
        withdraw_if_over(fence, [name])
    return Written(name, digest_of(content), num_retries)


def digest_of(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _leaf_paths(schema: pa.Schema, names: list[str]) -> list[str]:
    return [f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name for name in names]
