"""Estimate of the CPUs, requests and bandwidth that 8, 64 and 512 GPUs need, and of the first bottleneck.

    python -m benchmarks.sizing [--gpu-images-per-s 9431] [--decode-ms 1.27] [--image-kb 100] ...

The estimate is computed from costs that were measured separately (the defaults; `jobs.benchmark` measures yours). It
shows which limit is reached first, but not effects that appear only at scale. One cost is measured by this program: the
driver's CPU time per task, with stages that do nothing.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from pipelines.runtime.ray_session import ray_session

NUM_GPUS = (1, 8, 64, 512)
# The first tasks start the workers.
NUM_WARM_UP_TASKS, NUM_TASKS = 200, 2000


@dataclass(frozen=True)
class Need:
    """Required amount of a resource.

    Attributes:
        name: Name of the resource with its unit.
        at: Function from images/s to the required amount.
        limit: Most that one driver, or one prefix of a bucket, provides. None if more can be bought.
    """

    name: str
    at: Callable[[float], float]
    limit: float | None = None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-images-per-s", type=float, default=9431, help="rate of the forward pass on one GPU")
    parser.add_argument("--decode-ms", type=float, default=1.27, help="CPU ms per image for decoding")
    parser.add_argument("--fetch-ms", type=float, default=0.3, help="CPU ms per image for fetching")
    parser.add_argument("--write-ms", type=float, default=0.05, help="CPU ms per image for writing")
    parser.add_argument("--ray-ms", type=float, default=2.0, help="CPU ms per image for copies by Ray")
    parser.add_argument("--image-kb", type=float, default=100, help="size of an encoded image")
    parser.add_argument("--row-kb", type=float, default=8.5, help="size of a Parquet row, including 2,048 features")
    parser.add_argument("--pixels-kb", type=float, default=150.5, help="size of a decoded image, 224 x 224 x 3")
    parser.add_argument(
        "--rows-per-task", type=int, default=1024, help="images per task, as in a run over a million images on GPUs"
    )
    parser.add_argument(
        "--prefix-requests-per-s", type=float, default=5500, help="S3's limit for one prefix of a bucket"
    )
    args = parser.parse_args()
    with ray_session():
        measure_driver(NUM_WARM_UP_TASKS)
        driver_s = measure_driver(NUM_TASKS)
    print(f"the driver spends {1000 * driver_s:.2f} ms of CPU time per task, for all three stages")
    needs = compute_needs(args, 1 / driver_s)
    print(f"{'':42}" + "".join(f"{num_gpus:>12,} GPU" for num_gpus in NUM_GPUS))
    print(f"{'images/s':42}" + "".join(f"{args.gpu_images_per_s * num_gpus:>16,.0f}" for num_gpus in NUM_GPUS))
    for need in needs:
        cells = "".join(f"{need.at(args.gpu_images_per_s * num_gpus):>16,.1f}" for num_gpus in NUM_GPUS)
        print(f"{need.name:42}{cells}")
    limits = sorted(
        (num_gpus_at_limit(need, args.gpu_images_per_s), need.name) for need in needs if need.limit is not None
    )
    for num_gpus, name in limits:
        print(f"{name}: the limit is reached at {num_gpus:,.2f} GPUs")


class NoOpReplica:
    """Replica that does nothing."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch unchanged."""
        return batch


def measure_driver(num_tasks: int) -> float:
    """Return the driver's CPU seconds per task of a chain like ours: read, actor, last task, returned row."""

    def identity(batch: pa.Table) -> pa.Table:
        return batch

    options: dict[str, Any] = {"num_cpus": 0.25}
    started = time.process_time()
    numbers = ray.data.range(num_tasks, override_num_blocks=num_tasks).map_batches(
        identity, batch_format="pyarrow", batch_size=None, **options
    )
    through = numbers.map_batches(
        NoOpReplica, batch_format="pyarrow", batch_size=None, compute=ray.data.ActorPoolStrategy(size=1), **options
    )
    rows = through.map_batches(identity, batch_format="pyarrow", batch_size=None, **options).iter_rows()
    assert sum(1 for _ in rows) == num_tasks
    return (time.process_time() - started) / num_tasks


def compute_needs(args: argparse.Namespace, driver_tasks_per_s: float) -> list[Need]:
    """Return the resources that grow with the rate."""
    core_s = (args.decode_ms + args.fetch_ms + args.write_ms + args.ray_ms) / 1000
    prefixes = "prefixes of a bucket, at S3's documented rate"
    return [
        Need("CPU cores to fetch, decode and write", lambda rate: rate * core_s),
        Need("GB/s from the store", lambda rate: rate * args.image_kb / 1e6),
        Need("GB/s of pixels to the GPU nodes", lambda rate: rate * args.pixels_kb / 1e6),
        Need("GB/s of Parquet to the store", lambda rate: rate * args.row_kb / 1e6),
        Need("GET requests/s", lambda rate: rate, args.prefix_requests_per_s),
        Need(prefixes, lambda rate: math.ceil(rate / args.prefix_requests_per_s)),
        Need("tasks/s from the driver", lambda rate: rate / args.rows_per_task, driver_tasks_per_s),
    ]


def num_gpus_at_limit(need: Need, gpu_images_per_s: float) -> float:
    """Return the number of GPUs that reaches the limit of a need, which grows in proportion to the rate."""
    assert need.limit is not None
    return need.limit / need.at(gpu_images_per_s)


if __name__ == "__main__":
    main()
