"""Ray Data pipeline that streams every worker its local batch of every step, in order.

Ray Data runs the tasks ahead of the workers and applies backpressure when the workers fall behind. `streaming_split`
gives each block to the worker that has received the fewest rows, and to the lowest rank among equals. With ordered
blocks of equal size, that is round-robin. Each local batch carries its step and rank, so that a worker can detect a
wrong assignment.
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

# Ray Data plans all blocks when a dataset starts, at about 0.1 ms each.
MAX_LOCAL_BATCHES_PER_DATASET = 16_384
# One local batch in use and one ready.
PREFETCH_LOCAL_BATCHES = 2


def split_among_workers(
    loader: LocalBatchLoader,
    images: "ray.ObjectRef[pa.Table]",
    first_step: int,
    num_steps: int,
    steps_per_epoch: int,
    num_cpus_per_task: float,
) -> list[DataIterator]:
    """Create a dataset of local batches and split it among the workers.

    Args:
        loader: Loader of the local batches.
        images: `uri` and `target` of the set.
        first_step: First step, counted from 0 over all epochs.
        num_steps: Number of steps, at most `max_steps_per_dataset`.
        steps_per_epoch: Number of steps in an epoch.
        num_cpus_per_task: CPUs that Ray reserves for each task, which loads one local batch.

    Returns:
        One iterator per worker, which can be sent to other processes.
    """
    num_local_batches = num_steps * loader.world_size
    # Ray Data fuses the two stages into one task because they request the same resources.
    numbers = range_dataset(num_local_batches, num_cpus=num_cpus_per_task)
    dataset = numbers.map_batches(
        LocalBatchTask(loader, images, first_step, steps_per_epoch), batch_size=1, num_cpus=num_cpus_per_task
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # keeps a local batch in one block, however large
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    iterators: list[DataIterator] = dataset.streaming_split(loader.world_size, equal=False)
    return iterators


def max_steps_per_dataset(world_size: int) -> int:
    """Return the largest number of steps in one dataset."""
    return max(1, MAX_LOCAL_BATCHES_PER_DATASET // world_size)


def iterate_local_batches(
    iterator: DataIterator, rank: int, first_step: int, steps_per_epoch: int
) -> Iterator[dict[str, Any]]:
    """Yield a worker's local batches in order, as `LocalBatchLoader.load` returns them.

    Raises:
        RuntimeError: Ray Data delivered another local batch than the next one of this worker.
    """
    expected = first_step
    # None returns whole blocks. Ray's type annotations do not include it.
    batch_size: Any = None
    batches = iterator.iter_batches(
        batch_size=batch_size, batch_format="numpy", prefetch_batches=PREFETCH_LOCAL_BATCHES
    )
    for local_batch in batches:
        wanted = (*divmod(expected, steps_per_epoch), rank)
        found = (local_batch["epoch"][0], local_batch["step"][0], local_batch["rank"][0])
        if found != wanted:
            # An `AssertionError` would end the run, but a restart restores the order.
            raise RuntimeError(f"worker expected local batch (epoch, step, rank) = {wanted}, received {found}")
        expected += 1
        yield local_batch


def errors_of(local_batch: dict[str, NDArray[Any]]) -> list[tuple[int, str]]:
    """Return the id and error of each failed image of a local batch."""
    return [(int(index), error) for index, error in zip(local_batch["id"], local_batch["error"]) if error]
