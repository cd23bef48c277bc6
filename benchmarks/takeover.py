"""Lost and duplicate rows when a second run takes over from a driver that was killed, frozen or cut off from the store.

    python -m benchmarks.takeover [--rounds 20] [--num-images 600] [--places local s3] [--seed 0]

In each round a run labels photographs, and is broken at a random moment, also during compaction and during
`--failure.retry all`. The faults are:

- killed: the driver is killed, and its workers survive it for some seconds.
- frozen: all processes of its PID namespace receive SIGSTOP, as in a paused VM.
- driver frozen: only the driver receives SIGSTOP.
- cut off: only the driver loses its connection to the store.

A second run takes over and finishes. It has another PID namespace, so the lease regards it as another machine. Then
the first run wakes up, unless it was killed. Rows are counted in every file that a reader finds as `part-*.parquet` or
`failed-*.parquet`, first when the second run has finished, and again 60 s after the first run has woken up. By then the
first run must have stopped. Heartbeats are more frequent than in a real run.

The rounds called "at once" have no fault. Two runs acquire the lease at the same moment, and must end with the exit
statuses 0 and 2.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from cluster.local.faulty_proxy import Faults, Proxy, faulty_proxy
from cluster.local.object_store import ObjectStore, object_store
from cluster.local.photographs import crops, encode
from cluster.local.ray_head import RayHead, ray_head
from pipelines.outputs.file_names import is_failed, list_files
from pipelines.storage import uris
from pipelines.storage.bulk import read_object
from pipelines.storage.filesystem import list_names

# Instead of the default 5, 16 and 14.5 s.
HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S, GIVE_UP_S = 0.5, 4.0, 3.0
RUN_TIMEOUT_S = 300
SETTLE_S = 60.0
# Runs the job with frequent heartbeats, and with compaction of small files. If LINE_UP names a folder, two runs wait
# for each other before they acquire the lease.
RUNNER = f"""
import os, pathlib, time, uuid
import pipelines.outputs.lease as lease
if folder := os.environ.get("LINE_UP"):
    acquire = lease.Lease.acquire
    def acquire_together(self):
        pathlib.Path(folder, uuid.uuid4().hex).touch()
        while len(os.listdir(folder)) < 2:
            time.sleep(0.001)
        acquire(self)
    lease.Lease.acquire = acquire_together
lease.HEARTBEAT_INTERVAL_S = {HEARTBEAT_INTERVAL_S}
lease.HEARTBEAT_TIMEOUT_S, lease.GIVE_UP_S = {HEARTBEAT_TIMEOUT_S}, {GIVE_UP_S}
import pipelines.outputs.compaction as compact
compact.MIN_BYTES, compact.FULL_BYTES, compact.MIN_FAILED_FILES = 30_000, 60_000, 3
from jobs.infer import InferConfig, label_and_embed, main
main("jobs.infer", InferConfig, label_and_embed)
"""
FAULTS = ("killed", "frozen", "driver frozen", "cut off", "at once")


class Count(NamedTuple):
    """Check of an output.

    Attributes:
        num_lost: Number of inputs without a row.
        num_doubled: Number of inputs with more than one row.
        is_as_expected: True if `_SUCCESS` exists, the first run had not failed before its fault, and each run has ended
            as it should.
    """

    num_lost: int
    num_doubled: int
    is_as_expected: bool


@dataclass
class Bench:
    """Parameters and services that the rounds share.

    Attributes:
        store: Object store.
        proxy: Proxy through which the driver of the first run reaches the store.
        head: Ray head whose workers reach the store directly.
        folder: Folder of the photographs and local outputs.
        num_images: Number of photographs, a tenth of which are broken.
        rng: Random number generator that chooses the moments.
        later: Threads that count rows some time after a run has woken up, while other rounds run.
    """

    store: ObjectStore
    proxy: Proxy
    head: RayHead
    folder: Path
    num_images: int
    rng: random.Random
    later: ThreadPoolExecutor

    @property
    def input_uri(self) -> str:
        """Folder of the photographs."""
        return str(self.folder / "in")

    def command(self, output_uri: str, *keys: str, in_namespace: bool) -> list[str]:
        """Return the command line of the job, in a separate PID namespace or in that of this program."""
        job = [sys.executable, "-c", RUNNER, "--input.uri", self.input_uri, "--output.uri", output_uri]
        job += ["--model.name", "test_resnet", "--model.weights", "random", "--preprocess.image_size", "32"]
        job += ["--output.commit_rows", "32", "--failure.max_fraction", "1", "--compute.batch_size", "8", *keys]
        if not in_namespace:
            return job
        # If the driver were the first process of the namespace, its workers would die with it.
        first = '"$@" & wait $!; status=$?; [ $status -lt 128 ] || sleep 10; exit $status'
        return ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", first, "sh", *job]

    @contextlib.contextmanager
    def job(
        self, output_uri: str, *keys: str, in_namespace: bool = True, **variables: str
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start the job, and kill it if it is still running at the end of the block."""
        environment = os.environ | self.store.environment() | variables
        log = open(self.folder / "log", "ab")  # noqa: SIM115 - closed below
        command = self.command(output_uri, *keys, in_namespace=in_namespace)
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            log.close()

    def finish(self, output_uri: str, *keys: str) -> bool:
        """Run the job to its end, at most three times, and return True if the first attempt succeeded."""
        for attempt in range(3):
            with self.job(output_uri, *keys) as process:
                status = process.wait(RUN_TIMEOUT_S)
            if status == 0:
                return attempt == 0
            print(f"the second run exited with status {status}: {self.log_tail()}", file=sys.stderr)
        raise RuntimeError(f"the second run failed three times on {output_uri}")

    def log_tail(self) -> str:
        """Return the end of the log of the jobs."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def count(self, output_uri: str, is_as_expected: bool = True) -> Count:
        """Count the rows that a reader of the output finds."""
        ids = [np.zeros(0, np.int64)]
        for name in list_files(output_uri):
            with contextlib.suppress(FileNotFoundError):
                content = read_object(uris.join(output_uri, name))
                ids.append(pq.read_table(io.BytesIO(content), columns=["id"])["id"].to_numpy())
        counts = np.bincount(np.concatenate(ids), minlength=self.num_images)
        is_as_expected &= "_SUCCESS" in list_names(output_uri)
        return Count(int(np.sum(counts == 0)), int(np.sum(counts > 1)), is_as_expected)


def main() -> None:
    """Print a row for each round and a table of totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds for each fault and place")
    parser.add_argument("--num-images", type=int, default=600)
    parser.add_argument("--places", nargs="+", choices=["local", "s3"], default=["local", "s3"])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(
        "place  fault          moment                             lost, doubled, as expected: at first, and after 60 s"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        object_store(buckets=("results",)) as store,
        ThreadPoolExecutor(args.rounds) as later,
    ):
        os.environ.update(store.environment())
        environment = store.environment() | {"PYTHONPATH": os.getcwd()}
        with faulty_proxy(store.endpoint, Faults()) as proxy, ray_head(2, environment) as head:
            bench = Bench(store, proxy, head, Path(folder), args.num_images, random.Random(args.seed), later)
            write_images(bench)
            rounds = {
                (place, fault): [start_round(bench, place, fault, number) for number in range(args.rounds)]
                for place in args.places
                for fault in args.faults
                if (place, fault) != ("local", "cut off")
            }
            totals = {key: [one.result() for one in started] for key, started in rounds.items()}
    print(f"\n{'place':8}{'fault':16}{'rounds':>8}{'lost':>8}{'doubled':>9}{'not as expected':>17}")
    for (place, fault), pairs in totals.items():
        counts = [count for pair in pairs for count in pair]
        lost, doubled = sum(count.num_lost for count in counts), sum(count.num_doubled for count in counts)
        unexpected = sum(not count.is_as_expected for count in counts)
        print(f"{place:8}{fault:16}{len(pairs):>8}{lost:>8}{doubled:>9}{unexpected:>17}")


def write_images(bench: Bench) -> None:
    """Write the photographs, a tenth of which are broken."""
    folder = Path(bench.input_uri)
    folder.mkdir()
    for index, (name, image) in enumerate(crops(bench.num_images, size=(64, 48))):
        (folder / f"{name}.jpg").write_bytes(b"no image" if index % 10 == 3 else encode(image))


def start_round(bench: Bench, place: str, fault: str, number: int) -> "Future[tuple[Count, Count]]":
    """Run a round up to its first count.

    Returns:
        Future of the first count and the second count, which is taken `SETTLE_S` later.
    """
    name = f"{fault.replace(' ', '-')}-{number}"
    output_uri = f"s3://results/{name}" if place == "s3" else str(bench.folder / name)
    is_retry = number % 4 == 3
    keys = ["--failure.retry", "all"] if is_retry else []
    if is_retry:
        bench.finish(output_uri)
    with contextlib.ExitStack() as stack:
        if fault == "at once":
            moment, ended, first = start_together(bench, stack, output_uri, keys)
        else:
            moment, ended, first = take_over(bench, stack, output_uri, keys, fault)
        woken = stack.pop_all()
    return bench.later.submit(count_later, bench, woken, first, output_uri, f"{place:6} {fault:14} {moment:34}", ended)


def take_over(
    bench: Bench, stack: contextlib.ExitStack, output_uri: str, keys: list[str], fault: str
) -> tuple[str, Count, "subprocess.Popen[bytes]"]:
    """Run one job, break it, let another take over, and wake the first one up."""
    variables = {}
    if fault == "cut off":
        variables = {"RAY_ADDRESS": bench.head.address, "HOME": str(bench.head.home)}
        variables |= {"AWS_ENDPOINT_URL": bench.proxy.endpoint}
    # A driver cannot connect to a Ray head whose processes it does not see.
    first = stack.enter_context(bench.job(output_uri, *keys, in_namespace=fault != "cut off", **variables))
    moment = wait_for_moment(bench, output_uri, first, is_retry=bool(keys))
    had_failed = first.poll() not in (None, 0)
    wake = break_run(bench, first, fault)
    ended = bench.count(output_uri, is_as_expected=bench.finish(output_uri) and not had_failed)
    wake()
    return moment, ended, first


def start_together(
    bench: Bench, stack: contextlib.ExitStack, output_uri: str, keys: list[str]
) -> tuple[str, Count, "subprocess.Popen[bytes]"]:
    """Start two jobs that acquire the lease at the same moment."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir=bench.folder))
    jobs = [stack.enter_context(bench.job(output_uri, *keys, LINE_UP=folder)) for _ in range(2)]
    statuses = sorted(job.wait(RUN_TIMEOUT_S) for job in jobs)
    return f"statuses {statuses}", bench.count(output_uri, is_as_expected=statuses == [0, 2]), jobs[0]


def count_later(
    bench: Bench,
    woken: contextlib.ExitStack,
    first: "subprocess.Popen[bytes]",
    output_uri: str,
    title: str,
    ended: Count,
) -> tuple[Count, Count]:
    """Count again after the time in which a woken run should have stopped, then remove the output."""
    with woken:
        time.sleep(SETTLE_S)
        later = bench.count(output_uri, is_as_expected=first.poll() is not None)
    print(title, *ended, "  ", *later, flush=True)
    if uris.is_local(output_uri):
        shutil.rmtree(output_uri)
    return ended, later


def wait_for_moment(bench: Bench, output_uri: str, process: "subprocess.Popen[bytes]", is_retry: bool) -> str:
    """Wait for a random moment of the run, and return its description."""
    kind = bench.rng.choice(["rows are written", "files are merged"])
    delay_s = bench.rng.uniform(0, 0.5 if kind == "files are merged" else 2.5)
    ready: dict[str, Callable[[], bool]] = {
        "rows are written": lambda: any(
            not is_failed(name) and "merged" not in name for name in list_files(output_uri)
        ),
        "files are merged": lambda: any("-merged" in name for name in list_files(output_uri)),
    }
    if is_retry:
        kind, delay_s = "failed rows are retried", bench.rng.uniform(0, 4)
        ready[kind] = lambda: "_SUCCESS" not in list_names(output_uri)
    while not ready[kind]() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay_s)
    return f"{kind} + {delay_s:.2f} s"


def break_run(bench: Bench, process: "subprocess.Popen[bytes]", fault: str) -> Callable[[], None]:
    """Break a run, and return a function that wakes it up."""
    if fault == "cut off":
        bench.proxy.is_gone = True
        return lambda: setattr(bench.proxy, "is_gone", False)
    shell = children_of(process.pid)[:1]
    driver = [child for first in shell for child in children_of(first)[:1]]
    if fault == "killed":
        send(driver, signal.SIGKILL)
        return lambda: None
    frozen = driver if fault == "driver frozen" else [one for first in shell for one in processes_in_namespace(first)]
    send(frozen, signal.SIGSTOP)
    return lambda: send(frozen, signal.SIGCONT)


def children_of(process_id: int) -> list[int]:
    """Return the child processes of a process in the order of their start."""
    with contextlib.suppress(FileNotFoundError):  # the process has ended
        return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]
    return []


def processes_in_namespace(process_id: int) -> list[int]:
    """Return all processes in the PID namespace of a process."""
    found: list[int] = []
    try:
        namespace = os.readlink(f"/proc/{process_id}/ns/pid")
    except FileNotFoundError:
        return found
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.readlink(entry / "ns/pid") == namespace:
                found.append(int(entry.name))
    return found


def send(process_ids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes that may have ended."""
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)


if __name__ == "__main__":
    main()
