"""Memory and rate of one long run, from its first thousand images to its last: both should be flat.

    python -m benchmarks.scale [--num-images 20000] [--model mobilenetv3_small_050]

Prints a line for each of some numbers of images done: images/s since the line before, and the most memory since then of
the driver, of the replica (proportional set size) and of Ray's object store (pages of it ever touched). A small model,
so that the rate is high and whatever grows with the images shows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cluster.local import object_store
from cluster.photographs import crops, encode
from cluster.processes import descendants, memory_bytes
from pipelines import run_record
from pipelines.storage import uris
from pipelines.storage.bulk import store_object
from pipelines.storage.filesystem import read_bytes

INPUT_URI, OUTPUT_URI = "s3://images/many", "s3://results/many"
NUM_DISTINCT, NUM_WRITERS = 256, 8
MARKS = (1_000, 2_000, 5_000, 10_000, 15_000, 20_000, 50_000, 100_000)
POLL_S = 0.5


class Sample(NamedTuple):
    """What was seen at one moment."""

    at_s: float
    num_ok: int
    driver_bytes: int
    replica_bytes: int
    store_bytes: int


def main() -> None:
    """Run, and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--model", default="mobilenetv3_small_050")
    args = parser.parse_args()
    with object_store(buckets=("images", "results")) as store:
        os.environ.update(store.environment())
        write_images(args.num_images)
        command = [sys.executable, "-m", "jobs.infer", "--input.uri", INPUT_URI, "--output.uri", OUTPUT_URI]
        command += ["--model.name", args.model, "--model.weights", "random", "--preprocess.mode", "fast"]
        samples = list(watch(command))
    print(f"{'images done':>12}{'images/s':>12}{'driver MB':>12}{'replica MB':>12}{'object store MB':>18}")
    marks = [mark for mark in MARKS if mark < args.num_images] + [args.num_images]
    before, rest = samples[0], samples
    for mark in marks:
        lap = [sample for sample in rest if sample.num_ok <= mark]
        rest = rest[len(lap) :]
        if not lap or lap[-1].num_ok == before.num_ok:
            continue
        # The first to see so many: the run publishes them every few seconds.
        last = next(sample for sample in lap if sample.num_ok == lap[-1].num_ok)
        rate = (last.num_ok - before.num_ok) / (last.at_s - before.at_s)
        memory = [max(sample[column] for sample in lap) / 1e6 for column in (2, 3, 4)]
        print(f"{last.num_ok:12,}{rate:12.1f}{memory[0]:12.0f}{memory[1]:12.0f}{memory[2]:18.0f}")
        before = last


def write_images(count: int) -> None:
    """As many objects, of some hundred contents."""
    contents = [encode(image, quality=94) for _, image in crops(NUM_DISTINCT)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(
            pool.map(
                lambda index: store_object(f"{INPUT_URI}/{index:06d}.jpg", contents[index % NUM_DISTINCT]), range(count)
            )
        )


def watch(command: list[str]) -> Iterator[Sample]:
    """Run a job, and look at it again and again."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    while process.poll() is None:
        below = descendants(process.pid)
        replicas = [pid for pid, command in below.items() if "PredictorActor" in command]
        raylets = [pid for pid, command in below.items() if "/raylet " in command]
        yield Sample(
            time.monotonic() - started,
            num_ok(),
            memory_bytes(process.pid),
            sum(map(memory_bytes, replicas)),
            sum(map(shared_bytes, raylets)),
        )
        time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(f"the job ended with status {process.returncode}")


def num_ok() -> int:
    """By what the run publishes."""
    try:
        return int(json.loads(read_bytes(uris.join(OUTPUT_URI, run_record.PROGRESS_FILE)))["num_ok"])
    except (OSError, ValueError):
        return 0


def shared_bytes(pid: int) -> int:
    """Pages of shared memory that a process has touched."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))


if __name__ == "__main__":
    main()
