"""The commit log of an epoch: which files a run keeps, removes and merges, written down before it acts.

`_lock/commits-000003.json` belongs to the run that holds epoch 3, which alone writes it. A run first writes what it is
about to do, then makes sure that it still holds the lease, then acts. Its successor first takes the lease, then reads
the log. So every deletion that a run may still carry out, however late it wakes, is one that its successor knows of and
has counted on.
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
# Of compactions before there were epochs: a list of merges.
OLD_COMPACTION_FILE = "_compaction.json"
ADVICE = "delete it if no run works on this output; the same command then keeps the files that it finds"
# A successor publishes its log within seconds of taking the lease. Ray needs longer to end the workers of a run.
WITHDRAW_WAIT_S, WITHDRAW_POLL_S = 60.0, 1.0
# A store that was out of reach for longer may be out of reach for hours.
WITHDRAW_LIMIT_S = 150.0


def _only_our_files(name: str) -> str:
    """Refuse a name that is not one of ours, such as a path to elsewhere: what is named here may be deleted."""
    if not is_file(name):
        raise ValueError(f"{name!r} is not the name of a part or failed file")
    return name


FileName = Annotated[str, AfterValidator(_only_our_files)]


class Merge(BaseModel):
    """Files that become one.

    Attributes:
        target: name of the new file. Once it exists, the sources no longer count.
        sources: names of the files whose rows it takes.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    target: FileName
    sources: list[FileName]


class Commits(Document):
    """Content of a commit log.

    Attributes:
        files: names of the files that counted when the run began or, once it has finished, when it ended.
        removed: names of files that do not count any more.
        merges: files that become one.
        is_finished: whether the run wrote all of its files.
    """

    files: list[FileName]
    removed: list[FileName] = []
    merges: list[Merge] = []
    is_finished: bool = False


@dataclass
class CommitLog:
    """Writes the commit log of one lease.

    Attributes:
        fence: of the lease.
        commits: what the log says.
    """

    fence: Fence
    commits: Commits = field(default_factory=lambda: Commits(files=[]))

    def begin(self, files: Iterable[str], removed: Iterable[str]) -> None:
        """Publish which files count, remove the others, and drop the logs of earlier epochs."""
        self._publish(files=sorted(files))
        self.remove(removed)
        for epoch, uri in list_logs(self.fence.output_uri).items():
            if epoch < self.fence.epoch:
                remove(uri)
        remove(uris.join(self.fence.output_uri, OLD_COMPACTION_FILE))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that do not count."""
        names = sorted(names)
        if names:
            self._publish(removed=[*self.commits.removed, *names])
        for name in names:
            self.fence.check()
            remove(uris.join(self.fence.output_uri, name))

    def merge(self, merges: Sequence[Merge]) -> None:
        """Announce that files become one."""
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
    """Return the URI of each commit log by its epoch."""
    names = list_keys(uris.join(output_uri, LOCK_FOLDER))
    return {int(found[1]): lock_uri(output_uri, name) for name in names if (found := LOG_NAME.fullmatch(name))}


@dataclass(frozen=True)
class History:
    """Decisions of earlier runs on an output.

    Attributes:
        epoch: of the last commit log; -1 where there is none, so that every file may count.
        commits: what it says.
    """

    epoch: int
    commits: Commits

    def may_count(self, name: str, epoch: int) -> bool:
        """Return whether a file, written under `epoch`, counts unless a merge has replaced it."""
        if epoch > self.epoch:
            return True
        if name in self.commits.removed:
            return False
        return name in self.commits.files or (epoch == self.epoch and not self.commits.is_finished)


def read_history(output_uri: str, before_epoch: int) -> History:
    """Read the last commit log before an epoch.

    Raises:
        RequestError: it is damaged.
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


def withdraw_if_over(fence: Fence, names: Sequence[str]) -> None:
    """After a write: where the lease is over, remove the files unless the run that has it now counts them.

    Raises:
        LeaseLostError: the lease is over.
    """
    if current_epoch(fence.output_uri) == fence.epoch:
        return
    commits = _commits_of_successor(fence)
    if commits is not None:
        for name in names:
            if name not in commits.files:
                remove(uris.join(fence.output_uri, name))
    fence.check()


def withdraw_late_files(fence: Fence, num_looks: int = 3, look_every_s: float = 2.0) -> None:
    """Remove what workers of a run that lost its lease wrote too late.

    Looks several times, as an upload may still be in flight, and gives up where the store does not answer.

    Args:
        fence: of the lost lease.
        num_looks: how often to look.
        look_every_s: seconds between two looks.
    """
    log.info("the lease on %s is lost: removing files that this run wrote since", fence.output_uri)

    def look() -> None:
        for number in range(num_looks):
            time.sleep(look_every_s if number else 0)
            with contextlib.suppress(LeaseLostError):
                own = [name for name in list_files(fence.output_uri) if epoch_of(name) == fence.epoch]
                withdraw_if_over(fence, own)

    looking = threading.Thread(target=_log_errors(look), daemon=True)
    looking.start()
    looking.join(WITHDRAW_LIMIT_S)


def _log_errors(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except Exception as error:  # the run has ended by an error of its own, which counts
            log.warning("files that were written too late could not be removed: %s", error)

    return run


def _commits_of_successor(fence: Fence) -> Commits | None:
    """Wait for the commit log of the run that has the lease now; None where it publishes none in time."""

    def read() -> Commits | None:
        uri = lock_uri(fence.output_uri, f"commits-{current_epoch(fence.output_uri):06d}.json")
        try:
            return read_document(uri, Commits, ADVICE)
        except (FileNotFoundError, RequestError):
            return None

    waiting = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda commits: commits is None),
        wait=tenacity.wait_fixed(WITHDRAW_POLL_S),
        stop=tenacity.stop_after_delay(WITHDRAW_WAIT_S),
        retry_error_callback=lambda state: None,
    )
    commits: Commits | None = waiting(read)
    return commits
