"""On paper: what 8, 64 and 512 GPUs need in CPUs, requests and bandwidth, and where the first wall stands.

    python -m benchmarks.sizing [--gpu-images-per-s 9431] [--decode-ms 1.27] [--image-kb 100] ...

A calculation from costs that were measured one by one (the defaults; `jobs.benchmark` measures yours): it says which
limit is met first, and leaves out all that only shows at scale. One cost is measured here and now: the CPU time that
the driver spends on a task's way through the chain, by stages that do nothing.
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
# The first tasks bring the workers up.
NUM_WARM_UP_TASKS, NUM_TASKS = 200, 2000


@dataclass(frozen=True)
class Need:
    """A resource: what is needed at a rate, how that is written, and the limit, if it is one's own.

    Attributes:
        name: what people call it.
        at: the need at images/s.
        limit: the most that one driver, or one prefix of a bucket, gives; None where more can be bought.
    """

    name: str
    at: Callable[[float], float]
    limit: float | None = None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-images-per-s", type=float, default=9431, help="of one GPU's forward pass")
    parser.add_argument("--decode-ms", type=float, default=1.27, help="core time an image")
    parser.add_argument("--fetch-ms", type=float, default=0.3, help="core time an image")
    parser.add_argument("--write-ms", type=float, default=0.05, help="core time an image")
    parser.add_argument("--ray-ms", type=float, default=2.0, help="core time an image of Ray's copies")
    parser.add_argument("--image-kb", type=float, default=100)
    parser.add_argument("--row-kb", type=float, default=8.5, help="of Parquet, 2,048 features among it")
    parser.add_argument("--pixels-kb", type=float, default=150.5, help="of a decoded image: 224 x 224 x 3")
    parser.add_argument("--rows-per-task", type=int, default=1024, help="images; a million on GPUs come in such tasks")
    parser.add_argument("--prefix-requests-per-s", type=float, default=5500, help="S3's for one prefix of a bucket")
    args = parser.parse_args()
    with ray_session():
        measure_driver(NUM_WARM_UP_TASKS)
        driver_s = measure_driver(NUM_TASKS)
    print(f"the driver spends {1000 * driver_s:.2f} ms of CPU time on a task's way through three stages")
    needs = needs_of(args, 1 / driver_s)
    print(f"{'':42}" + "".join(f"{num_gpus:>12,} GPU" for num_gpus in NUM_GPUS))
    print(f"{'images/s':42}" + "".join(f"{args.gpu_images_per_s * num_gpus:>16,.0f}" for num_gpus in NUM_GPUS))
    for need in needs:
        cells = "".join(f"{need.at(args.gpu_images_per_s * num_gpus):>16,.1f}" for num_gpus in NUM_GPUS)
        print(f"{need.name:42}{cells}")
    walls = sorted((wall(need, args.gpu_images_per_s), need.name) for need in needs if need.limit is not None)
    for num_gpus, name in walls:
        print(f"{name}: the limit is met at {num_gpus:,.2f} GPUs")


class Nothing:
    """A replica that does nothing."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch."""
        return batch


def measure_driver(num_tasks: int) -> float:
    """CPU seconds of this process a task: read, an actor, a last task, a row that comes back."""

    def pass_on(batch: pa.Table) -> pa.Table:
        return batch

    share: dict[str, Any] = {"num_cpus": 0.25}
    started = time.process_time()
    numbers = ray.data.range(num_tasks, override_num_blocks=num_tasks).map_batches(
        pass_on, batch_format="pyarrow", batch_size=None, **share
    )
    through = numbers.map_batches(
        Nothing, batch_format="pyarrow", batch_size=None, compute=ray.data.ActorPoolStrategy(size=1), **share
    )
    rows = through.map_batches(pass_on, batch_format="pyarrow", batch_size=None, **share).iter_rows()
    assert sum(1 for _ in rows) == num_tasks
    return (time.process_time() - started) / num_tasks


def needs_of(args: argparse.Namespace, driver_tasks_per_s: float) -> list[Need]:
    """All that grows with the rate."""
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


def wall(need: Need, gpu_images_per_s: float) -> float:
    """How many GPUs it takes to meet a limit; every need but the prefixes' grows in proportion."""
    assert need.limit is not None
    return need.limit / need.at(gpu_images_per_s)


if __name__ == "__main__":
    main()
