"""Output directory: the lease on it, its records and files, and its rows.

    with output.claim() as lease:            # one run at a time
        lease.acquire()
        commit = output.begin(lease, done)   # logs the committed files, then removes the others
        commit.writer(...)                   # writes files, in workers
        commit.add(write_result)
        commit.tidy(...)                     # removes strays, merges small files
        commit.finish(record)                # checksums, `_run.json`, `_SUCCESS`

Code outside this package does not depend on the names of an output's files.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from pipelines.errors import RequestError
from pipelines.inputs.listing import list_objects
from pipelines.inputs.manifest import Manifest, find_manifest, write_manifest
from pipelines.inputs.reader import Listing
from pipelines.outputs import contents, run_record
from pipelines.outputs.commit import Commit
from pipelines.outputs.commit_log import remove_late_files
from pipelines.outputs.contents import Done
from pipelines.outputs.file_names import list_files, list_sizes
from pipelines.outputs.lease import Lease
from pipelines.outputs.rows import DEFAULT_BATCH_ROWS, read_batches, read_table
from pipelines.outputs.run_record import RUN_FILE
from pipelines.storage import uris
from pipelines.storage.documents import Content, read_document
from pipelines.storage.filesystem import exists, list_names, translate_storage_errors
from pipelines.storage.uploads import abort_unfinished_uploads


@dataclass(frozen=True)
class Output:
    """Output directory on a local disk or in an object store.

    Attributes:
        uri: Normalized URI.
    """

    uri: str

    # Lease.

    def lease(self) -> Lease:
        """Return a lease that has not been acquired yet."""
        return Lease(self.uri)

    @contextlib.contextmanager
    def claim(self) -> Iterator[Lease]:
        """Yield a lease that has not been acquired yet, and clean up after it.

        If the lease is lost, files that arrived after the takeover are removed at the end of the `with` block.
        """
        with self.lease() as lease:
            try:
                yield lease
            finally:
                if lease.is_lost:
                    remove_late_files(lease.fence)

    def abort_unfinished_uploads(self) -> None:
        """Abort multipart uploads, and remove local files, that killed runs left unfinished."""
        abort_unfinished_uploads(self.uri)

    # Run record.

    def find_run(self) -> dict[str, Any] | None:
        """Return the content of `_run.json`, or None if no run has started here.

        Raises:
            RequestError: The directory contains something else, or the record is damaged or of a newer version.
        """
        return run_record.find_run(self.uri) if exists(self.uri) else None

    def read_run(self, schema: type[Content]) -> Content:
        """Return the content of `_run.json`, validated by a schema.

        Raises:
            FileNotFoundError: No run has started here.
            DamagedFileError: The file is damaged.
            RequestError: A newer version of ecaray wrote it.
        """
        return read_document(self.uri_of(RUN_FILE), schema, run_record.ADVICE)

    def refuse_other_run(self, found: Mapping[str, Any], identity: Mapping[str, Any], schema: type[BaseModel]) -> None:
        """Raise RequestError if a run with this identity may not resume the run that `found` describes."""
        run_record.refuse_other_run(self.uri, found, identity, schema)

    def refuse_if_changed(self, found: Mapping[str, Any] | None) -> None:
        """Raise RequestError if `_run.json` is no longer what `find_run` returned."""
        run_record.refuse_if_changed(self.uri, found)

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Write `_run.json`.

        Raises:
            RequestError: The output is not writable.
        """
        run_record.write_run(self.uri, record)

    def write_progress(self, figures: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
        """Write `_progress.json`. A failure is logged and does not end the run.

        Args:
            figures: Progress figures of the run.
            check: Callable that raises if the file may no longer be written.
        """
        run_record.write_progress(self.uri, figures, check)

    def is_complete(self) -> bool:
        """Return whether `_SUCCESS` exists."""
        return run_record.is_complete(self.uri)

    def mark_complete(self) -> None:
        """Write `_SUCCESS`."""
        run_record.mark_complete(self.uri)

    # Contents.

    def uri_of(self, name: str) -> str:
        """Return the URI of a file or folder below the output."""
        return uris.join(self.uri, name)

    @property
    def manifest_uri(self) -> str:
        """URI of the folder that contains the manifest."""
        return self.uri_of("_manifest")

    def find_manifest(self) -> Manifest | None:
        """Return the manifest of the inputs, or None if no run has pinned its inputs.

        Raises:
            DamagedFileError: The manifest is damaged.
            RequestError: The output has rows but no manifest, so that their ids mean nothing.
        """
        manifest = find_manifest(self.manifest_uri)
        if manifest is None and (files := list_files(self.uri)):
            raise RequestError(
                f"{self.uri} contains {files[0]} but no _manifest/manifest.json, without which its ids mean nothing: "
                "restore the manifest from a backup, or write to a new output"
            )
        return manifest

    def write_manifest(self, input_uri: str, exclude: list[str], listing: Listing, epoch: int, reader: str) -> Manifest:
        """Pin the inputs. See `pipelines.inputs.manifest.write_manifest` for arguments and errors."""
        return write_manifest(self.manifest_uri, input_uri, exclude, listing, epoch, reader)

    def find_done(self, num_inputs: int, epoch: int, retried_kinds: Container[str] = ()) -> Done:
        """Return the rows and files that exist. See `pipelines.outputs.contents.find_done` for arguments and errors."""
        with translate_storage_errors("read", self.uri):
            return contents.find_done(self.uri, num_inputs, epoch, retried_kinds)

    def matches_record(self, done: Done) -> bool:
        """Return whether a finished output is complete and has exactly the files in its record."""
        return contents.matches_record(self.uri, done)

    def read_digests(self) -> dict[str, str] | None:
        """Return the SHA-256 of each recorded file by name, or None if no run has finished.

        Raises:
            DamagedFileError: The record is damaged.
        """
        return contents.read_digests(self.uri)

    def list_files(self) -> list[str]:
        """Return the sorted names of all part and failed files, committed or not."""
        return list_files(self.uri)

    def list_sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of all part and failed files, by name."""
        return list_sizes(self.uri)

    def list_names(self) -> list[str]:
        """Return the names of everything directly below the output."""
        return list_names(self.uri)

    def list_parquet_paths(self) -> list[str]:
        """Return the relative paths of all files that a Parquet reader of the folder would read.

        pandas and Arrow also read subfolders, and skip names that begin with `_` or `.`. Other readers accept the
        suffix in upper case too.
        """
        listing = list_objects(self.uri, [])
        paths = [uri.removeprefix(self.uri).lstrip("/") for uri in listing.table["uri"].to_pylist()]
        return [path for path in paths if path.lower().endswith(".parquet") and not path.startswith(("_", "."))]

    # Writing rows.

    def begin(self, lease: Lease, done: Done) -> Commit:
        """Log the committed files, remove the others, and return the commit that adds files to the output.

        Raises:
            RequestError: The output is not writable.
        """
        commit = Commit(self.uri, lease, done)
        commit.begin()
        return commit

    # Reading rows.

    def table(self, columns: list[str] | None = None, *, failed: bool = False) -> pa.Table:
        """Return the rows, sorted by id.

        Args:
            columns: Names of the columns to read; all by default.
            failed: True to return the failed rows (`id`, `uri`, `error_kind`, `error_message`) instead of the good
                rows.

        Raises:
            RequestError: A column does not exist.
            DamagedFileError: A file is damaged.
        """
        return read_table(self.uri, columns, failed)

    def batches(
        self, columns: list[str] | None = None, *, batch_rows: int = DEFAULT_BATCH_ROWS, failed: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches, with no more than a few files in memory.

        Args:
            columns: Names of the columns to read; all by default.
            batch_rows: Maximum number of rows per batch.
            failed: True to yield the failed rows instead of the good rows.

        Yields:
            Batches, sorted by id within each file.

        Raises:
            RequestError: A column does not exist.
            DamagedFileError: A file is damaged.
        """
        return read_batches(self.uri, columns, batch_rows, failed)


def open_output(uri: str) -> Output:
    """Open the output of a run, finished or not, to read its rows. Does not need Ray.

    Args:
        uri: Local path, `s3://bucket/prefix`, or any URI that fsspec supports.

    Raises:
        RequestError: The location does not exist, or no job wrote it.
    """
    output = Output(uris.normalize(uri))
    if output.find_run() is None:
        raise RequestError(f"{output.uri} is not the output of a job: it has no {RUN_FILE}")
    return output
