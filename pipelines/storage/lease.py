"""One run at a time on an output: whoever holds `_lock.json`, and shows every few seconds that it is alive.

An object store has no locks. A holder that is cut off for longer than others watch for it loses the output to them,
finds out at its next sign of life, and stops where it next calls `check`.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import RequestError, RunError
from pipelines.storage import uris
from pipelines.storage.bulk import read_object, store_object
from pipelines.storage.filesystem import remove

log = logging.getLogger(__name__)

LOCK_FILE = "_lock.json"
BEAT_EVERY_S = 5.0
# Three signs of life that do not come are those of a run that is dead.
WATCH_S = 3 * BEAT_EVERY_S + 1
RELEASE_S = 5.0


class Lease:
    """The right to write to one output, from `take` to the end of the `with` block."""

    def __init__(self, output_uri: str) -> None:
        self._uri = uris.join(output_uri, LOCK_FILE)
        self._owner = uuid.uuid4().hex
        self._num_beats = 0
        self._is_lost = False
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take it, from a run that is dead too.

        Raises:
            RequestError: another run holds it and is alive.
        """
        found = self._read()
        if found and _is_alive(found, self._read):
            raise RequestError(
                f"another run is at work on {self._uri.rpartition('/')[0]}: process {found['pid']} on {found['host']}"
            )
        self._beat()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See whether it is still held.

        Raises:
            RunError: another run took it.
        """
        if self._is_lost:
            raise RunError("another run has taken over the output, while this one gave no sign of life")

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._is_over.set()
        # The store may be what ended the run. Without it, others see that this process is gone, or that no sign comes.
        release = threading.Thread(target=self._release, daemon=True)
        release.start()
        release.join(RELEASE_S)

    def _release(self) -> None:
        assert self._thread is not None
        self._thread.join()
        with contextlib.suppress(Exception):
            if not self._is_lost and self._is_held():
                remove(self._uri)

    def _keep(self) -> None:
        while not self._is_over.wait(BEAT_EVERY_S):
            try:
                self._is_lost = not self._is_held()
                if self._is_lost:
                    return
                self._beat()
            except Exception as error:  # the next sign of life may reach the store
                log.warning("no sign of life reaches %s: %s", self._uri, error)

    def _is_held(self) -> bool:
        found = self._read()
        return found is not None and found["owner"] == self._owner

    def _beat(self) -> None:
        self._num_beats += 1
        process = {"host": socket.gethostname(), "machine": _this_machine(), "pid": os.getpid()}
        process |= {"started": _start_of(os.getpid())}
        store_object(self._uri, json.dumps({"owner": self._owner, "beat": self._num_beats, **process}).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(read_object(self._uri))
        except (FileNotFoundError, ValueError):
            return None
        return found


def _is_alive(found: dict[str, Any], read: Callable[[], dict[str, Any] | None]) -> bool:
    if found["machine"] is not None and found["machine"] == _this_machine():
        return bool(_start_of(found["pid"]) == found["started"])
    log.info("a run on %s may be at work on this output: watching for %.0f s", found["host"], WATCH_S)
    silence_s = 0.0
    while silence_s < WATCH_S:
        time.sleep(BEAT_EVERY_S / 5)
        asked = time.monotonic()
        if (now := read()) != found:
            return now is not None
        # A store that answers late may have kept the other run waiting too.
        silence_s = silence_s + BEAT_EVERY_S / 5 if time.monotonic() - asked < BEAT_EVERY_S else 0.0
    return False


def _this_machine() -> str | None:
    """What two processes share that see each other's ids: the boot of a machine, and the namespace on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start_of(process_id: int) -> str | None:
    """When a process of this machine started, in ticks since boot: process ids come again. None where there is none."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
