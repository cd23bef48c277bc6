"""Rate at which Ray Data hands local batches to training workers, with a loader that does nothing.

    python -m benchmarks.loader [--world-sizes 1 4 16 64] [--num-rows 8] [--num-local-batches 32768]

The rate limits training whatever the number of CPUs and GPUs, because one driver coordinates all tasks. It is measured
with one step per task, and with as many steps per task as `jobs.train` plans. The workers are threads of this program.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pipelines.runtime.ray_session import ray_session
from pipelines.training import ingest
from pipelines.training.batches import LocalBatchLoader, SequentialSampler

INPUT_SIZE = (32, 32)


class NoOpLoader(LocalBatchLoader):
    """Loader of blank images."""

    def load(self, images: pa.Table, epoch: int, step: int, rank: int) -> dict[str, NDArray[Any]]:
        """Return a local batch with the right numbers and blank images."""
        numbers = {"epoch": epoch, "step": step, "rank": rank, "id": 0, "target": 0}
        result: dict[str, NDArray[Any]] = {
            name: np.full(self.num_rows, value, np.int64) for name, value in numbers.items()
        }
        result["image"] = np.zeros((self.num_rows, *self.input_size, 3), np.uint8)
        result["error"] = np.array([""] * self.num_rows, dtype=object)
        return result


def main() -> None:
    """Print a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--num-rows", type=int, default=8, help="images in a local batch")
    parser.add_argument("--num-local-batches", type=int, default=32_768, help="for all workers together")
    args = parser.parse_args()
    print(f"{'workers':>8}{'steps per task':>16}{'local batches/s':>18}")
    with ray_session():
        for world_size in args.world_sizes:
            num_steps = args.num_local_batches // world_size
            planned = ingest.plan_steps_per_task(make_loader(world_size, args.num_rows), num_steps)
            for steps_per_task in (1, planned):
                # Too slow to run all of them with one step per task.
                steps = num_steps if steps_per_task > 1 else max(1, num_steps // 16)
                rate = measure(world_size, args.num_rows, steps, steps_per_task)
                print(f"{world_size:8}{steps_per_task:16}{rate:18,.0f}", flush=True)


def make_loader(world_size: int, num_rows: int) -> NoOpLoader:
    """Return the loader that does nothing."""
    sampler, limits = SequentialSampler(1, 1), {"max_bytes": 1, "max_pixels": 1}
    no: Any = None
    return NoOpLoader(sampler, num_rows, no, INPUT_SIZE, world_size, reader=no, **limits)


def measure(world_size: int, num_rows: int, num_steps: int, steps_per_task: int) -> float:
    """Return the local batches per second, from the first one that arrives to the last."""
    with mock.patch.object(ingest, "plan_steps_per_task", return_value=steps_per_task):
        images = ray.put(pa.table({"uri": [""]}))
        split = ingest.split_among_workers(make_loader(world_size, num_rows), images, 0, num_steps, num_steps, 0.25)

    def consume(rank: int) -> tuple[float, float]:
        batches = ingest.iterate_local_batches(split[rank], num_rows, rank, 0, num_steps)
        next(batches)
        first = time.monotonic()
        assert sum(1 for _ in batches) == num_steps - 1
        return first, time.monotonic()

    with ThreadPoolExecutor(world_size) as workers:
        firsts, lasts = zip(*workers.map(consume, range(world_size)))
    elapsed_s: float = max(lasts) - min(firsts)
    return world_size * num_steps / elapsed_s


if __name__ == "__main__":
    main()
