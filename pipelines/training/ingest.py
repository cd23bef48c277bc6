"""Ray Data pipeline that streams every worker its local batch of every step, in order.

Ray Data runs the tasks ahead of the workers and applies backpressure when the workers fall behind. A task loads the
local batches of one worker for some steps, as one block. `streaming_split` gives each block to the worker that has
received the fewest rows, and to the lowest rank among equals. With ordered blocks of equal size, that is round-robin.
Each local batch carries its step and rank, so that a worker can detect a wrong assignment.
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
MAX_TASKS_PER_DATASET = 16_384
# One block in use and one ready.
PREFETCH_BLOCKS = 2
# A task costs the driver about 20 ms, whatever its size. Larger tasks than these would save little of that.
MAX_ROWS_PER_TASK, MAX_BYTES_PER_TASK = 1024, 128 << 20
# With fewer tasks, the CPUs would be idle at the start and the end of a short dataset.
MIN_TASKS_PER_WORKER = 16


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
        num_cpus_per_task: CPUs that Ray reserves for each task.

    Returns:
        One iterator per worker, which can be sent to other processes.
    """
    steps_per_task = plan_steps_per_task(loader, num_steps)
    num_tasks = -(-num_steps // steps_per_task) * loader.world_size
    # Ray Data fuses the two stages into one task because they request the same resources.
    numbers = range_dataset(num_tasks, num_cpus=num_cpus_per_task)
    task = LocalBatchTask(loader, images, first_step, num_steps, steps_per_task, steps_per_epoch)
    dataset = numbers.map_batches(task, batch_size=1, num_cpus=num_cpus_per_task)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # keeps the local batches of a task in one block, however large
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    iterators: list[DataIterator] = dataset.streaming_split(loader.world_size, equal=False)
    return iterators


def plan_steps_per_task(loader: LocalBatchLoader, num_steps: int) -> int:
    """Return the number of steps whose local batches one task loads.

    Args:
        loader: Loader of the local batches.
        num_steps: Number of steps in the dataset.
    """
    return max(1, min(_max_steps_per_task(loader), num_steps // MIN_TASKS_PER_WORKER))


def _max_steps_per_task(loader: LocalBatchLoader) -> int:
    height, width = loader.input_size
    bytes_per_step = loader.num_rows * height * width * 3
    return max(1, min(MAX_ROWS_PER_TASK // loader.num_rows, MAX_BYTES_PER_TASK // bytes_per_step))


def max_steps_per_dataset(loader: LocalBatchLoader) -> int:
    """Return the largest number of steps in one dataset."""
    return max(1, MAX_TASKS_PER_DATASET // loader.world_size) * _max_steps_per_task(loader)


def iterate_local_batches(
    iterator: DataIterator, num_rows: int, rank: int, first_step: int, steps_per_epoch: int
) -> Iterator[dict[str, Any]]:
    """Yield a worker's local batches in order, as `LocalBatchLoader.load` returns them.

    Args:
        iterator: Iterator of the worker, from `split_among_workers`.
        num_rows: Number of rows in every local batch.
        rank: Rank of the worker.
        first_step: First step, counted from 0 over all epochs.
        steps_per_epoch: Number of steps in an epoch.

    Raises:
        RuntimeError: Ray Data delivered another local batch than the next one of this worker.
    """
    expected = first_step
    # None returns whole blocks. Ray's type annotations do not include it.
    batch_size: Any = None
    blocks = iterator.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=PREFETCH_BLOCKS)
    for local_batch in (part for block in blocks for part in _cut(block, num_rows)):
        wanted = (*divmod(expected, steps_per_epoch), rank)
        found = (local_batch["epoch"][0], local_batch["step"][0], local_batch["rank"][0])
        if found != wanted:
            # An `AssertionError` would end the run, but a restart restores the order.
            raise RuntimeError(f"worker expected local batch (epoch, step, rank) = {wanted}, received {found}")
        expected += 1
        yield local_batch


def _cut(block: dict[str, NDArray[Any]], num_rows: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the local batches of a block, as views of its memory."""
    for start in range(0, len(block["id"]), num_rows):
        yield {name: values[start : start + num_rows] for name, values in block.items()}


def errors_of(local_batch: dict[str, NDArray[Any]]) -> list[tuple[int, str]]:
    """Return the id and error of each failed image of a local batch."""
    return [(int(index), error) for index, error in zip(local_batch["id"], local_batch["error"]) if error]
