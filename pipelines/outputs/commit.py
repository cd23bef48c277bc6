"""Commit of one run: adds rows to an output under a lease, from the first commit log entry to `_SUCCESS`."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyarrow as pa

from pipelines.errors import RunError
from pipelines.outputs import run_record, schema
from pipelines.outputs.commit_log import CommitLog
from pipelines.outputs.compaction import compact, plan_compaction
from pipelines.outputs.contents import Done, complete_digests, write_digests
from pipelines.outputs.file_names import list_sizes
from pipelines.outputs.lease import Lease
from pipelines.outputs.writer import PartWriter
from pipelines.storage.filesystem import translate_storage_errors
from pipelines.storage.uploads import abort_unfinished_uploads

log = logging.getLogger(__name__)


class Commit:
    """Additions of one run to an output.

    Args:
        output_uri: URI of the output.
        lease: Acquired lease, which every step checks first.
        done: Contents of the output when the run began.
    """

    def __init__(self, output_uri: str, lease: Lease, done: Done) -> None:
        self._output_uri, self._lease, self._done = output_uri, lease, done
        self._log = CommitLog(lease.fence)
        self._digests: dict[str, str] = {}

    def begin(self) -> None:
        """Publish the list of committed files and remove all others. After this, workers may write.

        Raises:
            RequestError: The output is not writable.
        """
        with translate_storage_errors("write to", self._output_uri):
            self._lease.confirm()
            if self._lease.is_takeover:
                abort_unfinished_uploads(self._output_uri)
            run_record.mark_incomplete(self._output_uri)
            self._log.begin(self._done.names, self._done.removed)

    def writer(
        self, parts_schema: pa.Schema, metadata: Mapping[str, str], failed_schema: pa.Schema | None = None
    ) -> PartWriter:
        """Return the writer that workers use.

        Args:
            parts_schema: Schema of the good rows.
            metadata: Key-value metadata of each file.
            failed_schema: Schema of the failed rows. By default it has no carried columns.
        """
        failed = schema.failed_schema() if failed_schema is None else failed_schema
        return PartWriter(self._output_uri, parts_schema, dict(metadata), self._lease.fence, failed)

    def add(self, write_result: Mapping[str, Any]) -> None:
        """Add the files of one row of `WRITE_RESULTS` to the commit."""
        self._digests |= zip(write_result["files"], write_result["digests"])

    def tidy(self, wait_for_ray: Callable[[], None]) -> None:
        """Remove files that are not committed, then compact small files.

        Args:
            wait_for_ray: Callable that blocks until Ray is up. Called only if there is something to compact.

        Raises:
            RunError: A file is missing, or compaction failed. The same command resumes from there.
        """
        known = {*self._done.names, *self._digests}
        self._lease.wait_for_stragglers()
        self._lease.confirm()
        sizes = self._remove_strays(known)
        if missing := known - sizes.keys():
            raise RunError(
                f"{len(missing)} files of {self._output_uri} are missing, such as {min(missing)}: run the same command "
                "again to recompute their rows"
            )
        groups = plan_compaction(sizes, self._lease.fence.epoch)
        if not groups:
            return
        wait_for_ray()
        merged = compact(groups, self._log, self._lease)
        replaced = {name for group in groups for name in group.merge.sources}
        self._remove_strays(known - replaced | merged.keys())
        self._digests |= merged

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the checksums, `_run.json` and the final commit log, then `_SUCCESS`.

        Args:
            record: Content of `_run.json`.

        Raises:
            RunError: The store fails.
            LeaseLostError: Another run has taken over.
        """
        output_uri = self._output_uri
        with translate_storage_errors("write to", output_uri, RunError):
            digests = complete_digests(output_uri, self._digests)
            steps: tuple[Callable[[], None], ...] = (
                functools.partial(write_digests, output_uri, digests),
                functools.partial(run_record.write_run, output_uri, record),
                functools.partial(self._log.finish, digests),
                functools.partial(run_record.mark_complete, output_uri),
            )
            for step in steps:
                self._lease.confirm()
                step()

    def _remove_strays(self, known: Collection[str]) -> dict[str, int]:
        """Remove files that are not committed because their node or driver died before reporting them.

        Returns:
            Size in bytes of each remaining file, by name.
        """
        with translate_storage_errors("write to", self._output_uri, RunError):
            sizes = list_sizes(self._output_uri)
            strays = sizes.keys() - known
            for name in sorted(strays):
                log.info("removing %s, which an interrupted attempt left behind", name)
            self._log.remove(strays)
        return {name: size for name, size in sizes.items() if name not in strays}
