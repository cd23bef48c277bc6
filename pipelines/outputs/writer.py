"""Write stage: predictions to Parquet files, written atomically. Cardinality N:1, one write result per batch."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import RunError
from pipelines.outputs import schema as schemas
from pipelines.outputs.commit_log import remove_if_lease_lost
from pipelines.outputs.file_names import Kind, file_name
from pipelines.outputs.lease import Fence
from pipelines.outputs.reasons import reasons_of
from pipelines.outputs.schema import WRITE_RESULTS
from pipelines.runtime import metrics
from pipelines.storage import uris
from pipelines.storage.bulk import store_object
from pipelines.storage.filesystem import translate_storage_errors

# Smallest unit that a reader of a few rows must read. A row with an embedding takes 8 KB.
ROWS_PER_GROUP = 16_384


@dataclass(frozen=True)
class PartWriter:
    """Writer of batches of predictions to an output.

    Attributes:
        output_uri: URI of the output.
        parts_schema: Schema of the good rows.
        metadata: Key-value metadata of each file.
        fence: Fence of the run's lease, or None for files that no lease protects.
        failed_schema: Schema of the failed rows.
    """

    output_uri: str
    parts_schema: pa.Schema
    metadata: dict[str, str]
    fence: Fence | None = None
    failed_schema: pa.Schema = field(default_factory=schemas.failed_schema)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write one batch to `part-*.parquet` and, if images failed, `failed-*.parquet`.

        Args:
            batch: Rows of predictions, good and failed.

        Returns:
            One row of `WRITE_RESULTS`.
        """
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
        # Rows that did not come from a decoder, such as those of the benchmark, have no such column.
        num_clipped = batch["is_clipped"].to_pylist().count(True) if "is_clipped" in batch.column_names else 0
        columns = [[good.num_rows], [reasons_of(failed)], [names], [digests], [num_retries], [num_clipped]]
        return pa.table(columns, schema=WRITE_RESULTS)

    def _write(self, kind: Kind, table: pa.Table) -> "WrittenFile":
        name = file_name(kind, pc.min(table["id"]).as_py(), self.fence.epoch if self.fence else 0)
        return write_table(self.output_uri, name, table, table.schema.with_metadata(self.metadata), self.fence)


class WrittenFile(NamedTuple):
    """File that was written.

    Attributes:
        name: Name of the file.
        digest: SHA-256 of its content, in hexadecimal.
        num_retries: Number of attempts to store it before the last one.
    """

    name: str
    digest: str
    num_retries: int


def write_table(
    output_uri: str, name: str, table: pa.Table, schema: pa.Schema, fence: Fence | None = None
) -> WrittenFile:
    """Write a Parquet file, sorted by id.

    Args:
        output_uri: URI of the output.
        name: Name of the file.
        table: Rows of the file, whose types can be cast to those of the schema.
        schema: Schema of the file, with its metadata.
        fence: Fence of the run's lease, or None for a file that no lease protects.

    Raises:
        LeaseLostError: The lease is lost. The file is not written, or is removed again unless the successor has
            committed it.
        RunError: The store fails or is full. The message names the file.
    """
    table = table.sort_by("id")
    buffer = io.BytesIO()
    # The floats of an embedding rarely repeat, so a dictionary would only cost time and space.
    dictionary = [name for name in ("index", "label", "error_kind", "error_message") if name in table.column_names]
    with pq.ParquetWriter(buffer, schema, compression="zstd", use_dictionary=_leaf_paths(schema, dictionary)) as writer:
        for start in range(0, table.num_rows, ROWS_PER_GROUP):
            writer.write_table(table.slice(start, ROWS_PER_GROUP).cast(schema))
    metrics.count("ecaray_written_bytes", buffer.tell())
    uri, content = uris.join(output_uri, name), buffer.getvalue()
    with translate_storage_errors("write", uri, RunError):
        num_retries = store_object(uri, content, check=fence.check if fence else None)
    if fence:
        remove_if_lease_lost(fence, [name])
    return WrittenFile(name, digest_of(content), num_retries)


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _leaf_paths(schema: pa.Schema, names: list[str]) -> list[str]:
    return [f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name for name in names]
