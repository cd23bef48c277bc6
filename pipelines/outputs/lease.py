"""Exclusive lease on an output directory, with heartbeats and a fencing epoch, so that one run at a time writes to it.

`_lock/epoch-000007.json` under an output is the seventh lease on it. It is created by a conditional write, so if
several runs start together, exactly one gets the lease. The highest epoch is the current one. Its holder rewrites the
file every few seconds (the heartbeat) and marks it as released at the end. The file stays until that of the next epoch
exists, so that epochs only grow.

A lease cannot stop a process that is frozen or partitioned from the store. Therefore writes and deletions, on the
driver and in workers, first check the run's `Fence`, and file names contain the epoch. A run that lost its lease
without noticing can neither overwrite nor delete files of its successor. The method is fencing tokens (M. Kleppmann,
"How to do distributed locking", 2016; C. Gray and D. Cheriton, "Leases", 1989).
"""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import RequestError, RunError
from pipelines.storage import uris
from pipelines.storage.bulk import list_keys, store_object
from pipelines.storage.conditional import create_object
from pipelines.storage.documents import Document, read_document, to_json
from pipelines.storage.filesystem import remove

log = logging.getLogger(__name__)

LOCK_FOLDER = "_lock"
EPOCH_NAME = re.compile(r"epoch-(\d+)\.json")
# Lock file written by versions before leases had epochs.
OLD_LOCK_FILE = "_lock.json"
HEARTBEAT_INTERVAL_S = 5.0
# Three missed heartbeats mean that the run is dead.
HEARTBEAT_TIMEOUT_S = 3 * HEARTBEAT_INTERVAL_S + 1
# The holder stops shortly before other runs may take over.
GIVE_UP_S = HEARTBEAT_TIMEOUT_S - 1.5
RELEASE_TIMEOUT_S = 5.0
# Ray ends the workers of a killed driver within 3 to 5 s (measured on two cores). Their uploads in flight then complete
# or fail within seconds.
STRAGGLERS_S = 10.0
# A process asks the store for the current epoch at most once per this time.
FENCE_AGE_S = 1.0
# Raises KeyboardInterrupt in the main thread if the lease is lost. SIGINT would not do: a shell script starts its
# background jobs (`&`) with SIGINT ignored.
INTERRUPT = signal.SIGUSR2
ADVICE = "check that no other run is using this output, then delete the file"


class LeaseLostError(RunError):
    """Loss of the lease: another run has taken over the output, or may do so."""


class Holder(Document):
    """Content of an epoch file.

    Attributes:
        owner: Random id of the lease.
        beat: Number of the last heartbeat.
        host: Host name of the holder.
        machine: Identity of the holder's boot and PID namespace, or None if unknown.
        pid: Process id of the holder.
        started: Start time of that process, in clock ticks since boot.
        released: True if the holder has released the lease.
    """

    owner: str
    beat: int
    host: str
    machine: str | None
    pid: int
    started: str | None
    released: bool = False


@dataclass(frozen=True)
class Fence:
    """Fencing token of a lease, which is pickled and sent to the workers of a run.

    Attributes:
        output_uri: URI of the output.
        epoch: Epoch of the lease.
    """

    output_uri: str
    epoch: int

    def check(self, max_age_s: float = FENCE_AGE_S) -> None:
        """Raise an error if the lease is lost.

        Args:
            max_age_s: Maximum age in seconds of the cached epoch. 0 always asks the store.

        Raises:
            LeaseLostError: Another run has taken over.
        """
        current = current_epoch(self.output_uri, max_age_s)
        if current != self.epoch:
            raise LeaseLostError(
                f"another run (epoch {current}) has taken over {self.output_uri} from this one (epoch {self.epoch})"
            )


class _CachedEpoch(NamedTuple):
    """Current epoch of an output, and the time of the request in seconds since boot."""

    read_at_s: float
    epoch: int


_cached_epochs: dict[str, _CachedEpoch] = {}


def current_epoch(output_uri: str, max_age_s: float = 0.0) -> int:
    """Return the highest epoch of an output, or 0 if no run has taken a lease on it.

    Args:
        output_uri: URI of the output.
        max_age_s: Maximum age in seconds of a cached result. 0 always asks the store.
    """
    now_s = _seconds_since_boot()
    cached = _cached_epochs.get(output_uri)
    if cached is None or now_s - cached.read_at_s > max_age_s:
        cached = _cached_epochs[output_uri] = _CachedEpoch(now_s, max(_list_epochs(output_uri), default=0))
    return cached.epoch


def lock_uri(output_uri: str, name: str) -> str:
    """Return the URI of a file in the lock folder of an output."""
    return uris.join(output_uri, f"{LOCK_FOLDER}/{name}")


class Lease:
    """Exclusive right to write to an output, from `acquire` to the end of the `with` block.

    Attributes:
        is_takeover: True if the previous lease was not released, so that its workers may still be writing.
    """

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri
        self._owner = uuid.uuid4().hex
        self._num_beats = 0
        self._epoch: int | None = None
        self._loss: str | None = None
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._last_beat_s = self._acquired_at_s = 0.0
        self._acquired_in_main_thread = False
        self.is_takeover = False

    @property
    def fence(self) -> Fence:
        """Fencing token of this lease, for writes in the driver and in workers. Requires an acquired lease."""
        assert self._epoch is not None, "the lease has not been acquired"
        return Fence(self._output_uri, self._epoch)

    @property
    def is_lost(self) -> bool:
        """True once another run has taken over or may have done so."""
        return self._loss is not None

    def acquire(self) -> None:
        """Acquire the lease, taking it over if its holder is dead.

        Raises:
            RequestError: Another live run holds the lease, or won a simultaneous start.
        """
        refuse_old_lock(self._output_uri)
        highest = max(_list_epochs(self._output_uri), default=0)
        predecessor = self._read(highest) if highest else None
        if predecessor and not predecessor.released and _is_alive(predecessor, lambda: self._read(highest)):
            raise self._busy_error(predecessor)
        self.is_takeover = bool(predecessor and not predecessor.released)
        self._create(highest + 1)
        with contextlib.suppress(FileNotFoundError):
            remove(uris.join(self._output_uri, OLD_LOCK_FILE))
        self._acquired_at_s = _seconds_since_boot()
        self._acquired_in_main_thread = threading.current_thread() is threading.main_thread()
        if self._acquired_in_main_thread:
            signal.signal(INTERRUPT, signal.default_int_handler)  # and never restored: by default it ends the process
        loops = (self._send_heartbeats, self._watch_heartbeats)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise an error if the lease is known to be lost. Does not ask the store.

        Raises:
            LeaseLostError: Another run has taken over or may have done so.
        """
        if self._loss is not None:
            raise LeaseLostError(self._loss)

    def confirm(self) -> None:
        """Confirm with the store that the lease is still held, before a write that publishes state to other runs.

        Raises:
            LeaseLostError: Another run has taken over or may have done so.
        """
        self.check()
        self.fence.check(max_age_s=0)

    def wait_for_stragglers(self) -> None:
        """After a takeover, wait until uploads that the dead run's workers had in flight have completed or failed."""
        remaining_s = self._acquired_at_s + STRAGGLERS_S - _seconds_since_boot()
        if self.is_takeover and remaining_s > 0:
            log.info("waiting %.0f s for uploads of the previous run that may still be in flight", remaining_s)
            self._is_over.wait(remaining_s)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._threads:
            self._is_over.set()
            # Release in a thread with a timeout, because an unreachable store may be what ended the run. Without a
            # release, other runs see that this process is gone or that its heartbeats have stopped.
            release = threading.Thread(target=self._release, daemon=True)
            release.start()
            release.join(RELEASE_TIMEOUT_S)
        if kind is KeyboardInterrupt:
            self.check()  # replaces the interrupt by a LeaseLostError if `_mark_lost` sent it

    def _create(self, epoch: int) -> None:
        """Create the file of an epoch, and check that no later epoch exists."""
        uri, content = self._uri_of(epoch), self._content()
        self._last_beat_s = _seconds_since_boot()
        if not create_object(uri, content):
            winner = self._read(epoch)
            if winner is None or winner.owner != self._owner:  # otherwise our own retried request created it
                raise self._busy_error(winner)
        epochs = _list_epochs(self._output_uri)
        if max(epochs) != epoch:  # other runs held and released later epochs meanwhile, and removed the earlier files
            remove(uri)
            raise self._busy_error(self._read(max(epochs)))
        self._epoch = epoch
        _cached_epochs[self._output_uri] = _CachedEpoch(_seconds_since_boot(), epoch)
        for old in epochs:
            if old < epoch:
                remove(self._uri_of(old))

    def _busy_error(self, holder: Holder | None) -> RequestError:
        who = f": process {holder.pid} on {holder.host}" if holder else ""
        return RequestError(f"another run is using {self._output_uri}{who}")

    def _release(self) -> None:
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(Exception):
            if self._loss is None and self._epoch == current_epoch(self._output_uri):
                store_object(self._uri_of(self._epoch), self._content(released=True))

    def _send_heartbeats(self) -> None:
        """Send heartbeats until the lease ends."""
        while not self._is_over.wait(HEARTBEAT_INTERVAL_S):
            sent_at_s = _seconds_since_boot()
            try:
                if (current := current_epoch(self._output_uri)) != self._epoch:
                    self._mark_lost(f"another run (epoch {current}) has taken over {self._output_uri}")
                    return
                store_object(self._uri_of(current), self._content())
                self._last_beat_s = sent_at_s
            except Exception as error:
                log.warning("heartbeat to %s failed, and will be retried: %s", self._output_uri, error)

    def _watch_heartbeats(self) -> None:
        """Give the lease up before other runs may take over, if heartbeats keep failing.

        Only time in which this process runs counts, so that a process that was frozen first asks the store who holds
        the lease now.
        """
        tick_s = HEARTBEAT_INTERVAL_S / 10
        beat_at_s, silent_s, last_s = self._last_beat_s, 0.0, _seconds_since_boot()
        while self._loss is None and not self._is_over.wait(tick_s):
            now_s = _seconds_since_boot()
            silent_s += min(now_s - last_s, 2 * tick_s)
            last_s = now_s
            if self._last_beat_s != beat_at_s:
                beat_at_s, silent_s = self._last_beat_s, now_s - self._last_beat_s
            if silent_s > GIVE_UP_S:
                self._mark_lost(
                    f"no heartbeat of this run has reached {self._output_uri} for {silent_s:.0f} s, so another run may "
                    "take over; finished work is kept, and the same command resumes from there"
                )

    def _mark_lost(self, reason: str) -> None:
        if self._loss is not None or self._is_over.is_set():
            return
        self._loss = reason
        if self._acquired_in_main_thread:  # interrupt the main thread, which may be waiting for Ray for minutes
            signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)

    def _content(self, released: bool = False) -> bytes:
        self._num_beats += 1
        pid = os.getpid()
        return to_json(
            Holder(
                owner=self._owner,
                beat=self._num_beats,
                host=socket.gethostname(),
                machine=_this_machine(),
                pid=pid,
                started=_process_start(pid).ticks,
                released=released,
            )
        )

    def _uri_of(self, epoch: int) -> str:
        return lock_uri(self._output_uri, f"epoch-{epoch:06d}.json")

    def _read(self, epoch: int) -> Holder | None:
        return _read_holder(self._uri_of(epoch))


def refuse_old_lock(output_uri: str) -> None:
    """Refuse an output that is in use by a version of ecaray without epochs.

    Raises:
        RequestError: Such a run is alive, or its lock file is damaged.
    """
    uri = uris.join(output_uri, OLD_LOCK_FILE)
    holder = _read_holder(uri)
    if holder and _is_alive(holder, lambda: _read_holder(uri)):
        raise RequestError(f"another run is using {output_uri}: process {holder.pid} on {holder.host}")


def _read_holder(uri: str) -> Holder | None:
    try:
        return read_document(uri, Holder, ADVICE)
    except FileNotFoundError:
        return None


def _list_epochs(output_uri: str) -> list[int]:
    names = list_keys(uris.join(output_uri, LOCK_FOLDER))
    return [int(found[1]) for name in names if (found := EPOCH_NAME.fullmatch(name))]


def _is_alive(holder: Holder, read: Callable[[], Holder | None]) -> bool:
    """Return whether a holder is alive: by its process if it runs on this machine, otherwise by its heartbeats."""
    if holder.machine is not None and holder.machine == _this_machine():
        start = _process_start(holder.pid)
        if start.is_known:
            return start.ticks == holder.started
    log.info(
        "a run on %s may still be using this output: waiting %.0f s for a heartbeat", holder.host, HEARTBEAT_TIMEOUT_S
    )
    silence_s = 0.0
    while silence_s < HEARTBEAT_TIMEOUT_S:
        time.sleep(HEARTBEAT_INTERVAL_S / 5)
        requested_at = time.monotonic()
        if (now := read()) != holder:
            return now is not None and not now.released
        # Start over after a slow response, because a slow store may have delayed the other run's heartbeats too.
        is_slow = time.monotonic() - requested_at >= HEARTBEAT_INTERVAL_S
        silence_s = 0.0 if is_slow else silence_s + HEARTBEAT_INTERVAL_S / 5
    return False


def _this_machine() -> str | None:
    """Return an identity shared by processes that see each other's process ids: boot id and PID namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class _Start(NamedTuple):
    """Start time of a process, which tells apart processes that have had the same id.

    Attributes:
        is_known: False if the process is hidden (`hidepid`), stopped or frozen, so that only heartbeats can tell.
        ticks: Start time in clock ticks since boot, or None if no such process runs.
    """

    is_known: bool
    ticks: str | None


def _process_start(pid: int) -> _Start:
    try:
        # Split after the command name, which may contain spaces. State is then the first field, and the start time the
        # twentieth (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _Start(not _is_hidden(pid), None)
    if fields[0] in "ZX":  # a zombie: ended, but not yet reaped
        return _Start(True, None)
    return _Start(fields[0] not in "Tt", fields[19])


def _is_hidden(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _seconds_since_boot() -> float:
    """Return a monotonic time in seconds that also advances while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
