"""An output directory: who may write to it, what it holds, and how to read its rows.

    with output.claim() as lease:            # one run at a time
        lease.acquire()
        commit = output.begin(lease, done)   # which files count is written down before any is removed
        commit.writer(...)                   # adds files, in workers
        commit.add(write_result)
        commit.tidy(...)                     # removes strays, merges small files
        commit.finish(record)                # checksums, `_run.json`, `_SUCCESS`

Nothing outside this package knows the names of an output's files.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.errors import RequestError
from pipelines.inputs.listing import list_objects
from pipelines.inputs.manifest import Manifest, find_manifest, write_manifest
from pipelines.inputs.reader import Listing
from pipelines.outputs import contents, run_record
from pipelines.outputs.commit import Commit
from pipelines.outputs.commit_log import withdraw_late_files
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
    """One output directory, on a local disk or in an object store.

    Attributes:
        uri: normalized.
    """

    uri: str

    # Claiming it.

    def lease(self) -> Lease:
        """Return a lease that is not acquired yet."""
        return Lease(self.uri)

    @contextlib.contextmanager
    def claim(self) -> Iterator[Lease]:
        """Return a lease that is not acquired yet, and clean up after it.

        If the lease is lost, part files that arrived after the takeover are removed at the end of the `with` block.
        """
        with self.lease() as lease:
            try:
                yield lease
            finally:
                if lease.is_lost:
                    withdraw_late_files(lease.fence)

    def abort_unfinished_uploads(self) -> None:
        """Abort multipart uploads that killed runs left in the object store."""
        abort_unfinished_uploads(self.uri)

    # The record of the run.

    def find_run(self) -> dict[str, Any] | None:
        """Return the content of `_run.json`; None where no run began.

        Raises:
            RequestError: the directory holds something else, or the record is damaged or of a newer version.
        """
        return run_record.find_run(self.uri) if exists(self.uri) else None

    def read_run(self, schema: type[Content]) -> Content:
        """Return `_run.json`, validated by a schema of its fields.

        Raises:
            FileNotFoundError: no run began.
            DamagedFileError: it is damaged.
            RequestError: a newer version of ecaray wrote it.
        """
        return read_document(self.uri_of(RUN_FILE), schema, run_record.ADVICE)

    def refuse_other_run(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Raise RequestError if the run that `found` describes may not be continued by one with this identity."""
        run_record.refuse_other_run(self.uri, found, identity)

    def refuse_if_changed(self, found: Mapping[str, Any] | None) -> None:
        """Raise RequestError if `_run.json` is no longer what `find_run` returned."""
        run_record.refuse_if_changed(self.uri, found)

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Write `_run.json`. Raises RequestError where the output cannot be written."""
        run_record.write_run(self.uri, record)

    def write_progress(self, figures: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
        """Write `_progress.json`; a failure is logged, and does not end the run.

        Args:
            figures: of the run.
            check: raises where the file must not be written any more.
        """
        run_record.write_progress(self.uri, figures, check)

    def is_complete(self) -> bool:
        """Return whether `_SUCCESS` is there."""
        return run_record.is_complete(self.uri)

    def mark_complete(self) -> None:
        """Write `_SUCCESS`."""
        run_record.mark_complete(self.uri)

    # What it holds.

    def uri_of(self, name: str) -> str:
        """Return the URI of a file or folder below the output."""
        return uris.join(self.uri, name)

    @property
    def manifest_uri(self) -> str:
        """URI of the folder that holds the manifest."""
        return self.uri_of("_manifest")

    def find_manifest(self) -> Manifest | None:
        """Return the manifest of the inputs; None where no run pinned its inputs.

        Raises:
            DamagedFileError: it is damaged.
            RequestError: it is gone, and rows without their manifest mean nothing.
        """
        manifest = find_manifest(self.manifest_uri)
        if manifest is None and (files := list_files(self.uri)):
            raise RequestError(
                f"{self.uri} holds {files[0]} but no _manifest/manifest.json, without which its ids mean nothing: "
                "restore the manifest from a copy, or write to a new output"
            )
        return manifest

    def write_manifest(self, input_uri: str, exclude: list[str], listing: Listing, epoch: int, reader: str) -> Manifest:
        """Pin the inputs of the output; arguments and errors as for `pipelines.inputs.manifest.write_manifest`."""
        return write_manifest(self.manifest_uri, input_uri, exclude, listing, epoch, reader)

    def find_done(self, num_inputs: int, epoch: int, retried_kinds: Container[str] = ()) -> Done:
        """Return which inputs have rows; arguments and errors as for `pipelines.outputs.contents.find_done`."""
        with translate_storage_errors("read", self.uri):
            return contents.find_done(self.uri, num_inputs, epoch, retried_kinds)

    def is_as_recorded(self, done: Done) -> bool:
        """Return whether the files of a finished output are those of its record."""
        return contents.is_as_recorded(self.uri, done)

    def read_digests(self) -> dict[str, str] | None:
        """Return the SHA-256 of each recorded file by its name; None where no run ended.

        Raises:
            DamagedFileError: the record is damaged.
        """
        return contents.read_digests(self.uri)

    def list_files(self) -> list[str]:
        """Return the names of the part and failed files, in order, whether they count or not."""
        return list_files(self.uri)

    def list_sizes(self) -> dict[str, int]:
        """Return the bytes of the same files, by name."""
        return list_sizes(self.uri)

    def list_names(self) -> list[str]:
        """Return the names of everything directly below the output."""
        return list_names(self.uri)

    def list_parquet_paths(self) -> list[str]:
        """Return the paths below the output of all that a reader of the folder takes for Parquet files of results.

        pandas and Arrow also read subfolders, and leave out names that begin with `_` or `.`; others read any case.
        """
        listing = list_objects(self.uri, ["_*", ".*"])
        paths = [uri.removeprefix(self.uri).lstrip("/") for uri in listing.table["uri"].to_pylist()]
        return [path for path in paths if path.lower().endswith(".parquet")]

    # Adding rows.

    def begin(self, lease: Lease, done: Done) -> Commit:
        """Write down which files count, remove the others, and return what adds files to the output.

        Raises:
            RequestError: the output cannot be written.
        """
        commit = Commit(self.uri, lease, done)
        commit.begin()
        return commit

    # Reading rows.

    def table(self, columns: list[str] | None = None, *, failed: bool = False) -> pa.Table:
        """Return the rows, sorted by id.

        Args:
            columns: names; all of them by default.
            failed: return the failed rows (`id`, `uri`, `error_kind`, `error_message`) in place of the good ones.

        Raises:
            RequestError: there is no column of that name.
            DamagedFileError: a file is damaged.
        """
        return read_table(self.uri, columns, failed)

    def batches(
        self, columns: list[str] | None = None, *, batch_rows: int = DEFAULT_BATCH_ROWS, failed: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches, without holding more than a few files in memory.

        Args:
            columns: names; all of them by default.
            batch_rows: most rows of a batch.
            failed: yield the failed rows in place of the good ones.

        Yields:
            Batches, sorted by id within each file.

        Raises:
            RequestError: there is no column of that name.
            DamagedFileError: a file is damaged.
        """
        return read_batches(self.uri, columns, batch_rows, failed)


def open_output(uri: str) -> Output:
    """Return the output of a run, finished or not, to read its rows. Needs no Ray.

    Args:
        uri: a local path, `s3://bucket/prefix`, or what fsspec knows.

    Raises:
        RequestError: nothing is there, or no job wrote it.
    """
    output = Output(uris.normalize(uri))
    if output.find_run() is None:
        raise RequestError(f"{output.uri} holds no output: there is no {RUN_FILE}")
    return output
