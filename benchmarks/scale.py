"""Memory and rate of one long run, from its first thousand images to its last. Both should be constant.

    python -m benchmarks.scale [--num-images 20000] [--model mobilenetv3_small_050]

The benchmark prints a line at several numbers of processed images: images/s since the previous line, and the peak
memory since then of the driver, of the replica (proportional set size) and of the machine's shared memory, which is
Ray's object store. The model is small, so that the rate is high and any growth with the number of images is visible.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cluster.local.object_store import object_store
from cluster.local.photographs import crops, encode
from cluster.local.processes import descendants, memory_bytes
from pipelines.outputs.file_names import list_files
from pipelines.storage.bulk import store_object

INPUT_URI, OUTPUT_URI = "s3://images/many", "s3://results/many"
NUM_DISTINCT, NUM_WRITERS = 256, 8
COMMIT_ROWS = 256
MARKS = (1_000, 2_000, 5_000, 10_000, 15_000, 20_000, 50_000, 100_000)
POLL_S = 0.5


class Sample(NamedTuple):
    """Progress and memory at one moment."""

    at_s: float
    num_ok: int
    driver_bytes: int
    replica_bytes: int
    store_bytes: int


def main() -> None:
    """Run the job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--model", default="mobilenetv3_small_050")
    args = parser.parse_args()
    with object_store(buckets=("images", "results")) as store:
        os.environ.update(store.environment())
        write_images(args.num_images)
        command = [sys.executable, "-m", "jobs.infer", "--input.uri", INPUT_URI, "--output.uri", OUTPUT_URI]
        command += ["--model.name", args.model, "--model.weights", "random", "--preprocess.mode", "fast"]
        command += ["--output.commit_rows", str(COMMIT_ROWS)]
        samples = list(watch(command, args.num_images))
    print(f"{'images done':>12}{'images/s':>12}{'driver MB':>12}{'replica MB':>12}{'object store MB':>18}")
    marks = [mark for mark in MARKS if mark < args.num_images] + [args.num_images]
    before, rest = next(sample for sample in samples if sample.num_ok), samples
    for mark in marks:
        lap = [sample for sample in rest if sample.num_ok <= mark]
        rest = rest[len(lap) :]
        if not lap or lap[-1].num_ok == before.num_ok:
            continue
        # Use the first sample with this count.
        last = next(sample for sample in lap if sample.num_ok == lap[-1].num_ok)
        rate = (last.num_ok - before.num_ok) / (last.at_s - before.at_s)
        memory = [max(sample[column] for sample in lap) / 1e6 for column in (2, 3, 4)]
        print(f"{last.num_ok:12,}{rate:12.1f}{memory[0]:12.0f}{memory[1]:12.0f}{memory[2]:18.0f}")
        before = last


def write_images(count: int) -> None:
    """Write `count` objects, which share `NUM_DISTINCT` contents."""
    contents = [encode(image, quality=94) for _, image in crops(NUM_DISTINCT)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(
            pool.map(
                lambda index: store_object(f"{INPUT_URI}/{index:06d}.jpg", contents[index % NUM_DISTINCT]), range(count)
            )
        )


def watch(command: list[str], num_images: int) -> Iterator[Sample]:
    """Run a job over `num_images` images, and yield samples of it."""
    before, num_ok = shared_bytes(), 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    while process.poll() is None:
        below = descendants(process.pid)
        replicas = [pid for pid, command in below.items() if "PredictorActor" in command]
        # All files except the last one are full. Compaction at the end leaves fewer and larger files.
        num_files = sum(name.startswith("part-") for name in list_files(OUTPUT_URI))
        num_ok = max(num_ok, min(num_images, COMMIT_ROWS * num_files))
        memory = memory_bytes(process.pid), sum(map(memory_bytes, replicas)), shared_bytes() - before
        yield Sample(time.monotonic() - started, num_ok, *memory)
        time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(f"the job exited with status {process.returncode}")


def shared_bytes() -> int:
    """Return the machine's shared memory in use, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


if __name__ == "__main__":
    main()
