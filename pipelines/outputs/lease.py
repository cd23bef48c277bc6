"""One run at a time on an output: an exclusive lease with heartbeats and a fencing epoch.

`_lock/epoch-000007.json` under an output is the seventh lease on it. Each is created by a conditional write, so of
several runs that start together one gets it; the highest epoch is the current one. Its holder rewrites the file every
few seconds (the heartbeat) and marks it as released at the end. The file stays, so that epochs only ever grow.

A lease cannot stop a process that is frozen or cut off from the store. So whatever a run writes or deletes, on the
driver or in a worker, asks its `Fence` first, and the names of its files carry the epoch: a run that lost its lease
unawares neither overwrites nor deletes what its successor has. The method is that of fencing tokens (M. Kleppmann, "How
to do distributed locking", 2016; C. Gray and D. Cheriton, "Leases", 1989).
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
# The one lock of outputs that were written before leases had epochs.
OLD_LOCK_FILE = "_lock.json"
BEAT_EVERY_S = 5.0
# Three missed heartbeats mean that the run is dead.
WATCH_S = 3 * BEAT_EVERY_S + 1
# The holder stops a little before others may take over.
GIVE_UP_S = WATCH_S - 1.5
RELEASE_S = 5.0
# Ray ends the workers of a killed driver within 3 to 5 s (measured on two cores); an upload of theirs that is in flight
# then either arrives or breaks off within seconds.
STRAGGLERS_S = 10.0
# A process asks the store for the current epoch at most once in this time.
FENCE_AGE_S = 1.0
ADVICE = "check that no other run works on this output, then delete the file"


class LeaseLostError(RunError):
    """Another run has taken over the output, or may do so."""


class Holder(Document):
    """Content of an epoch's file.

    Attributes:
        owner: random id of the lease.
        beat: number of the last heartbeat.
        host: name of the holder's machine.
        machine: identity of the machine's boot and PID namespace; None where it is not known.
        pid: the holder's process.
        started: when that process started, in clock ticks since boot.
        released: whether the holder ended its run.
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
    """The right of one lease to write to an output. Is pickled into the workers of a run.

    Attributes:
        output_uri: the output.
        epoch: of the lease.
    """

    output_uri: str
    epoch: int

    def check(self, max_age_s: float = FENCE_AGE_S) -> None:
        """Refuse to go on where the lease is over.

        Args:
            max_age_s: age up to which this process's last look at the store counts, in seconds.

        Raises:
            LeaseLostError: another run has taken over.
        """
        current = current_epoch(self.output_uri, max_age_s)
        if current != self.epoch:
            raise LeaseLostError(
                f"another run (epoch {current}) has taken over {self.output_uri} from this one (epoch {self.epoch})"
            )


class _Look(NamedTuple):
    """A look at the store: when, in seconds since boot, and the current epoch then."""

    at_s: float
    epoch: int


_looks: dict[str, _Look] = {}


def current_epoch(output_uri: str, max_age_s: float = 0.0) -> int:
    """Return the highest epoch of an output; 0 where no run took a lease on it.

    Args:
        output_uri: the output.
        max_age_s: age up to which this process's last look at the store counts, in seconds.
    """
    now_s = _seconds_since_boot()
    look = _looks.get(output_uri)
    if look is None or now_s - look.at_s > max_age_s:
        look = _looks[output_uri] = _Look(now_s, max(_list_epochs(output_uri), default=0))
    return look.epoch


def lock_uri(output_uri: str, name: str) -> str:
    """Return the URI of a file in the lock folder of an output."""
    return uris.join(output_uri, f"{LOCK_FOLDER}/{name}")


class Lease:
    """The right to write to one output, from `take` to the end of the `with` block.

    Attributes:
        is_takeover: whether the lease before this one was not released: its workers may still be writing.
    """

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri
        self._owner = uuid.uuid4().hex
        self._num_beats = 0
        self._epoch: int | None = None
        self._loss: str | None = None
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._last_beat_s = self._taken_at_s = 0.0
        self._taken_in_main_thread = False
        self.is_takeover = False

    @property
    def fence(self) -> Fence:
        """The right of this lease, for workers and for writes. Only once it is taken."""
        assert self._epoch is not None, "the lease is not taken"
        return Fence(self._output_uri, self._epoch)

    @property
    def is_lost(self) -> bool:
        """True once another run has taken over, or may have."""
        return self._loss is not None

    def acquire(self) -> None:
        """Take the lease, also from a run that is dead.

        Raises:
            RequestError: another run holds it and is alive, or won a start at the same moment.
        """
        refuse_old_lock(self._output_uri)
        highest = max(_list_epochs(self._output_uri), default=0)
        predecessor = self._read(highest) if highest else None
        if predecessor and not predecessor.released and _is_alive(predecessor, lambda: self._read(highest)):
            raise self._busy(predecessor)
        self.is_takeover = bool(predecessor and not predecessor.released)
        self._create(highest + 1)
        with contextlib.suppress(FileNotFoundError):
            remove(uris.join(self._output_uri, OLD_LOCK_FILE))
        self._taken_at_s = _seconds_since_boot()
        self._taken_in_main_thread = threading.current_thread() is threading.main_thread()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep, self._watch)]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Refuse to go on where the lease is lost.

        Raises:
            LeaseLostError: another run has taken over, or may have.
        """
        if self._loss is not None:
            raise LeaseLostError(self._loss)

    def confirm(self) -> None:
        """Ask the store whether the lease still stands, before a write that others would take for the current state.

        Raises:
            LeaseLostError: another run has taken over, or may have.
        """
        self.check()
        self.fence.check(max_age_s=0)

    def wait_for_stragglers(self) -> None:
        """After a takeover, wait until what the dead run's workers had in flight has arrived or failed."""
        left_s = self._taken_at_s + STRAGGLERS_S - _seconds_since_boot()
        if self.is_takeover and left_s > 0:
            log.info("waiting %.0f s for uploads that the run before may have left in flight", left_s)
            self._is_over.wait(left_s)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._threads:
            self._is_over.set()
            # The store may be what ended the run. Without a release, others see that this process is gone, or that
            # its heartbeats stop.
            release = threading.Thread(target=self._release, daemon=True)
            release.start()
            release.join(RELEASE_S)
        if kind is KeyboardInterrupt:
            self.check()  # the interrupt was our own

    def _create(self, epoch: int) -> None:
        """Create the file of an epoch, and make sure that no later one exists."""
        uri, content = self._uri_of(epoch), self._content()
        self._last_beat_s = _seconds_since_boot()
        if not create_object(uri, content):
            winner = self._read(epoch)
            if winner is None or winner.owner != self._owner:  # else an earlier attempt arrived without an answer
                raise self._busy(winner)
        epochs = _list_epochs(self._output_uri)
        if max(epochs) != epoch:  # others took and released it meanwhile, and removed the files before theirs
            remove(uri)
            raise self._busy(self._read(max(epochs)))
        self._epoch = epoch
        _looks[self._output_uri] = _Look(_seconds_since_boot(), epoch)
        for old in epochs:
            if old < epoch:
                remove(self._uri_of(old))

    def _busy(self, holder: Holder | None) -> RequestError:
        who = f": process {holder.pid} on {holder.host}" if holder else ""
        return RequestError(f"another run is at work on {self._output_uri}{who}")

    def _release(self) -> None:
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(Exception):
            if self._loss is None and self._epoch == current_epoch(self._output_uri):
                store_object(self._uri_of(self._epoch), self._content(released=True))

    def _keep(self) -> None:
        """Send heartbeats until the end."""
        while not self._is_over.wait(BEAT_EVERY_S):
            sent_at_s = _seconds_since_boot()
            try:
                if (current := current_epoch(self._output_uri)) != self._epoch:
                    self._lose(f"another run (epoch {current}) has taken over {self._output_uri}")
                    return
                store_object(self._uri_of(current), self._content())
                self._last_beat_s = sent_at_s
            except Exception as error:
                log.warning("heartbeat to %s failed: %s", self._output_uri, error)

    def _watch(self) -> None:
        """Give the lease up once heartbeats have failed for as long as others wait for them.

        Counts the time in which this process runs: one that was frozen first asks the store who has the lease now.
        """
        tick_s = BEAT_EVERY_S / 10
        beat_at_s, silent_s, last_s = self._last_beat_s, 0.0, _seconds_since_boot()
        while self._loss is None and not self._is_over.wait(tick_s):
            now_s = _seconds_since_boot()
            silent_s += min(now_s - last_s, 2 * tick_s)
            last_s = now_s
            if self._last_beat_s != beat_at_s:
                beat_at_s, silent_s = self._last_beat_s, now_s - self._last_beat_s
            if silent_s > GIVE_UP_S:
                self._lose(
                    f"no heartbeat of this run has reached {self._output_uri} for {silent_s:.0f} s, so another run may "
                    "take over; what is done stays, and the same command goes on from there"
                )

    def _lose(self, reason: str) -> None:
        if self._loss is not None or self._is_over.is_set():
            return
        self._loss = reason
        if self._taken_in_main_thread:  # it may be waiting for Ray, for minutes
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

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
    """Refuse an output that a version of ecaray without epochs may be working on.

    Raises:
        RequestError: such a run is alive, or its lock is damaged.
    """
    uri = uris.join(output_uri, OLD_LOCK_FILE)
    holder = _read_holder(uri)
    if holder and _is_alive(holder, lambda: _read_holder(uri)):
        raise RequestError(f"another run is at work on {output_uri}: process {holder.pid} on {holder.host}")


def _read_holder(uri: str) -> Holder | None:
    try:
        return read_document(uri, Holder, ADVICE)
    except FileNotFoundError:
        return None


def _list_epochs(output_uri: str) -> list[int]:
    names = list_keys(uris.join(output_uri, LOCK_FOLDER))
    return [int(found[1]) for name in names if (found := EPOCH_NAME.fullmatch(name))]


def _is_alive(holder: Holder, read: Callable[[], Holder | None]) -> bool:
    """Ask the operating system where it can tell, and else watch for heartbeats."""
    if holder.machine is not None and holder.machine == _this_machine():
        start = _process_start(holder.pid)
        if start.is_known:
            return start.ticks == holder.started
    log.info("a run on %s may be at work on this output: watching for %.0f s", holder.host, WATCH_S)
    silence_s = 0.0
    while silence_s < WATCH_S:
        time.sleep(BEAT_EVERY_S / 5)
        asked = time.monotonic()
        if (now := read()) != holder:
            return now is not None and not now.released
        # A store that answers late may have kept the other run waiting too.
        silence_s = silence_s + BEAT_EVERY_S / 5 if time.monotonic() - asked < BEAT_EVERY_S else 0.0
    return False


def _this_machine() -> str | None:
    """Identity that two processes share where they see each other's process ids: a boot and a PID namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class _Start(NamedTuple):
    """When a process started.

    Attributes:
        is_known: False where the process is hidden (`hidepid`), stopped or frozen, so that only heartbeats tell.
        ticks: since boot, as process ids come again; None where no such process runs.
    """

    is_known: bool
    ticks: str | None


def _process_start(pid: int) -> _Start:
    try:
        # Behind the name, which may hold spaces: state is the first field, start time the twentieth (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _Start(not _is_hidden(pid), None)
    if fields[0] in "ZX":  # ended, and not yet waited for
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
    """Monotonic seconds that also pass while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
