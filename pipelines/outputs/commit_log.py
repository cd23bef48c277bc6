"""Commit log of an epoch: a write-ahead log of the files that a run keeps, removes and merges.

`_lock/commits-000003.json` belongs to the run that holds epoch 3, and only that run writes it. A run first logs what it
is about to do, then confirms that it still holds the lease, then acts. Its successor first takes the lease, then reads
the log. So however late a suspended run resumes, its successor already knows of every deletion that it may still carry
out.
"""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tenacity
from pydantic import AfterValidator, BaseModel, ConfigDict

from pipelines.errors import RequestError
from pipelines.outputs.file_names import epoch_of, is_file, list_files
from pipelines.outputs.lease import LOCK_FOLDER, Fence, LeaseLostError, current_epoch, lock_uri
from pipelines.storage import uris
from pipelines.storage.bulk import list_keys, read_object, store_object
from pipelines.storage.documents import Document, parse_json, read_document, to_json
from pipelines.storage.filesystem import remove

log = logging.getLogger(__name__)

LOG_NAME = re.compile(r"commits-(\d+)\.json")
# List of merges, written by versions before epochs existed.
OLD_COMPACTION_FILE = "_compaction.json"
ADVICE = "delete it if no run is using this output; the same command then keeps the files that it finds"
# Time to wait for a successor's log. It appears within seconds of the takeover, sooner than Ray ends a run's workers.
SUCCESSOR_WAIT_S, SUCCESSOR_POLL_S = 60.0, 1.0
# A store that has been unreachable for longer than this may stay so for hours.
REMOVE_LATE_TIMEOUT_S = 150.0


def _check_file_name(name: str) -> str:
    """Refuse any name that is not a part or failed file, such as a path, because files named here may be deleted."""
    if not is_file(name):
        raise ValueError(f"{name!r} is not the name of a part or failed file")
    return name


FileName = Annotated[str, AfterValidator(_check_file_name)]


class Merge(BaseModel):
    """Merge of several files into one.

    Attributes:
        target: Name of the new file. Once it exists, the sources are no longer committed.
        sources: Names of the files that are merged.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    target: FileName
    sources: list[FileName]


class Commits(Document):
    """Content of a commit log.

    Attributes:
        files: Names of the files that were committed when the run began or, if it is finished, when it ended.
        removed: Names of files that are no longer committed.
        merges: Merges of files.
        is_finished: True if the run wrote all of its files.
    """

    files: list[FileName]
    removed: list[FileName] = []
    merges: list[Merge] = []
    is_finished: bool = False


@dataclass
class CommitLog:
    """Writer of the commit log of one lease.

    Attributes:
        fence: Fence of the lease.
        commits: Current content of the log.
    """

    fence: Fence
    commits: Commits = field(default_factory=lambda: Commits(files=[]))

    def begin(self, files: Iterable[str], removed: Iterable[str]) -> None:
        """Publish the committed files, remove the others, and delete the logs of earlier epochs."""
        self._publish(files=sorted(files))
        self.remove(removed)
        for epoch, uri in list_logs(self.fence.output_uri).items():
            if epoch < self.fence.epoch:
                remove(uri)
        remove(uris.join(self.fence.output_uri, OLD_COMPACTION_FILE))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that are not committed, after logging their names."""
        names = sorted(names)
        if names:
            self._publish(removed=[*self.commits.removed, *names])
        for name in names:
            self.fence.check()
            remove(uris.join(self.fence.output_uri, name))

    def merge(self, merges: Sequence[Merge]) -> None:
        """Log merges before they are carried out."""
        self._publish(merges=list(merges))

    def finish(self, files: Iterable[str]) -> None:
        """Publish the final list of files."""
        self._publish(files=sorted(files), removed=[], merges=[], is_finished=True)

    def _publish(self, **changes: Any) -> None:
        self.commits = self.commits.model_copy(update=changes)
        uri = lock_uri(self.fence.output_uri, f"commits-{self.fence.epoch:06d}.json")
        store_object(uri, to_json(self.commits), check=self.fence.check)
        self.fence.check(max_age_s=0)


def list_logs(output_uri: str) -> dict[int, str]:
    """Return the URIs of the commit logs by epoch."""
    names = list_keys(uris.join(output_uri, LOCK_FOLDER))
    return {int(found[1]): lock_uri(output_uri, name) for name in names if (found := LOG_NAME.fullmatch(name))}


@dataclass(frozen=True)
class History:
    """Commit history of an output.

    Attributes:
        epoch: Epoch of the last commit log, or -1 if there is none, so that every file is committed.
        commits: Content of that log.
    """

    epoch: int
    commits: Commits

    def is_committed(self, name: str, epoch: int) -> bool:
        """Return whether a file written under `epoch` is committed. This ignores merges that have replaced it."""
        if epoch > self.epoch:
            return True
        if name in self.commits.removed:
            return False
        return name in self.commits.files or (epoch == self.epoch and not self.commits.is_finished)


def read_history(output_uri: str, before_epoch: int) -> History:
    """Read the last commit log before an epoch.

    Raises:
        RequestError: The log is damaged.
    """
    logs = {epoch: uri for epoch, uri in list_logs(output_uri).items() if epoch < before_epoch}
    if logs:
        epoch = max(logs)
        return History(epoch, read_document(logs[epoch], Commits, ADVICE))
    old = uris.join(output_uri, OLD_COMPACTION_FILE)
    try:
        content = read_object(old)
    except FileNotFoundError:
        return History(-1, Commits(files=[]))
    return History(-1, Commits(files=[], merges=parse_json(old, content, list[Merge], ADVICE)))


def remove_if_lease_lost(fence: Fence, names: Sequence[str]) -> None:
    """Check the lease after a write. If it is lost, remove the files unless the successor has committed them.

    Raises:
        LeaseLostError: The lease is lost.
    """
    if current_epoch(fence.output_uri) == fence.epoch:
        return
    commits = _commits_of_successor(fence)
    if commits is not None:
        for name in names:
            if name not in commits.files:
                remove(uris.join(fence.output_uri, name))
    fence.check()


def remove_late_files(fence: Fence, num_passes: int = 3, interval_s: float = 2.0) -> None:
    """Remove files that the workers of a run wrote after it had lost its lease.

    This makes several passes, because uploads may still be in flight, and gives up if the store does not respond.

    Args:
        fence: Fence of the lost lease.
        num_passes: Number of passes.
        interval_s: Seconds between passes.
    """
    log.info("the lease on %s is lost: removing files that this run wrote since then", fence.output_uri)

    def remove_all() -> None:
        for number in range(num_passes):
            time.sleep(interval_s if number else 0)
            with contextlib.suppress(LeaseLostError):
                own = [name for name in list_files(fence.output_uri) if epoch_of(name) == fence.epoch]
                remove_if_lease_lost(fence, own)

    thread = threading.Thread(target=_log_errors(remove_all), daemon=True)
    thread.start()
    thread.join(REMOVE_LATE_TIMEOUT_S)


def _log_errors(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except Exception as error:  # must not hide the error that ended the run
            log.warning("files written after the lease was lost could not be removed: %s", error)

    return run


def _commits_of_successor(fence: Fence) -> Commits | None:
    """Wait for the commit log of the run that holds the lease now. Return None if it does not appear in time."""

    def read() -> Commits | None:
        uri = lock_uri(fence.output_uri, f"commits-{current_epoch(fence.output_uri):06d}.json")
        try:
            return read_document(uri, Commits, ADVICE)
        except (FileNotFoundError, RequestError):
            return None

    waiting = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda commits: commits is None),
        wait=tenacity.wait_fixed(SUCCESSOR_POLL_S),
        stop=tenacity.stop_after_delay(SUCCESSOR_WAIT_S),
        retry_error_callback=lambda state: None,
    )
    commits: Commits | None = waiting(read)
    return commits
