"""Ray Data from ids to the training workers: every worker its share of every step, in order.

Ray Data runs the tasks ahead of the workers and holds back when they fall behind. `streaming_split` hands each block to
the worker that had the fewest rows, the first of them where several had: with blocks of equal size in order, that is
worker after worker. Each share carries its step and rank, so that a worker notices if that were ever not so.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import DataIterator

from pipelines.runtime.ray_compat import range_dataset
from pipelines.training.batches import LocalBatchLoader, LocalBatchTask

# Blocks are planned when a dataset starts, at about 0.1 ms each.
MAX_LOCAL_BATCHES_PER_DATASET = 16_384
# Shares that wait for a worker: one in use, one ready.
PREFETCH_LOCAL_BATCHES = 2


def split_among_workers(
    loader: LocalBatchLoader,
    images: "ray.ObjectRef[pa.Table]",
    first_step: int,
    num_steps: int,
    steps_per_epoch: int,
    num_cpus_per_task: float,
) -> list[DataIterator]:
    """The shares of some steps, one iterator a worker; iterators can be sent to other processes.

    Args:
        loader: makes one share.
        images: `uri` and `target` of the set.
        first_step: counted over all epochs, from 0.
        num_steps: how many; at most `max_steps_per_dataset`.
        steps_per_epoch: of the set.
        num_cpus_per_task: what Ray sets aside for each share in the making.
    """
    num_shares = num_steps * loader.world_size
    # Ray fuses the two stages into one task because they request the same resources.
    numbers = range_dataset(num_shares, num_cpus=num_cpus_per_task)
    dataset = numbers.map_batches(
        LocalBatchTask(loader, images, first_step, steps_per_epoch), batch_size=1, num_cpus=num_cpus_per_task
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # a share is one block, however large
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    iterators: list[DataIterator] = dataset.streaming_split(loader.world_size, equal=False)
    return iterators


def max_steps_per_dataset(world_size: int) -> int:
    """How many steps one dataset may hold."""
    return max(1, MAX_LOCAL_BATCHES_PER_DATASET // world_size)


def iterate_local_batches(
    iterator: DataIterator, rank: int, first_step: int, steps_per_epoch: int
) -> Iterator[dict[str, Any]]:
    """A worker's shares, in order, as `LocalBatchLoader.load` returns them."""
    expected = first_step
    # None: a block as it is, which Ray's annotations leave out.
    batch_size: Any = None
    batches = iterator.iter_batches(
        batch_size=batch_size, batch_format="numpy", prefetch_batches=PREFETCH_LOCAL_BATCHES
    )
    for share in batches:
        found = (share["epoch"][0], share["step"][0], share["rank"][0])
        if found != (*divmod(expected, steps_per_epoch), rank):
            # No `AssertionError`: a restart sets the order right.
            raise RuntimeError(f"worker {rank} at step {expected} was handed {found}")
        expected += 1
        yield share


def errors_of(share: dict[str, NDArray[Any]]) -> list[tuple[int, str]]:
    """Id and reason of each image of a share that could not be had."""
    return [(int(index), error) for index, error in zip(share["id"], share["error"]) if error]
