"""Sources: the input rows of the pipeline, task by task. Each task builds its own rows.

If the driver split the manifest into blocks instead, ten million images would become half a million objects that it
owns, and minutes would pass before the first fetch.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.inputs.idset import IdSet
from pipelines.inputs.manifest import Manifest

# Ray's overhead per task, 35 ms of a core, is worth the work on a few images, but large last tasks leave threads idle.
# 1,000 images with 16, 8 and 4 tasks for each of two threads took 0.97, 0.95 and 0.97 of the time with 31 tasks.
MIN_TASKS_PER_THREAD, QUICK_TASK_ROWS = 7, 128
# Tasks grow by one batch for each 262,144 rows of the run. That keeps the number of tasks at 16,384 on CPUs, or 1,024
# on GPUs with their larger and faster batches: enough to keep all replicas busy, and few enough for the driver
# (benchmarks/sizing.py).
RUN_ROWS_PER_TASK_BATCH = 262_144
MAX_ROWS_PER_TASK = 1024
# Small runs write at least this many files.
MIN_FILES_PER_RUN = 16


class Source(Protocol):
    """Input rows of a run, split into tasks."""

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""

    def rows_of(self, task: int) -> pa.Table:
        """Return the rows of one task, with `id`, `uri` and the other input columns."""


def rows_per_task(num_rows: int, batch_size: int, num_threads: int, max_rows: int = MAX_ROWS_PER_TASK) -> int:
    """Return the number of rows per task: one batch in small runs, several whole batches in large runs.

    Args:
        num_rows: Number of rows of the run.
        batch_size: Batch size of the model.
        num_threads: Number of threads of all replicas together.
        max_rows: Maximum number of rows per task, if that is at least one batch.
    """
    max_rows = min(max_rows, MAX_ROWS_PER_TASK)
    for_driver = -(-num_rows // RUN_ROWS_PER_TASK_BATCH)
    for_overhead = min(QUICK_TASK_ROWS, num_rows // (MIN_TASKS_PER_THREAD * num_threads)) // batch_size
    return batch_size * max(1, min(max(for_driver, for_overhead), max_rows // batch_size))


def cut_into_tasks(num_rows: int, task_rows: int, batch_size: int, num_threads: int) -> NDArray[np.int64]:
    """Return the position at which each task begins, followed by the end of the last task.

    The last tasks taper off to a single batch, so that no thread is idle while another one works on a large last task.
    This is guided self-scheduling (https://doi.org/10.1109/TC.1987.5009495) with sizes that halve.

    Args:
        num_rows: Number of rows of the run.
        task_rows: Number of rows per task, except for the last tasks.
        batch_size: Batch size of the model.
        num_threads: Number of threads of all replicas together.
    """
    sizes: list[int] = []
    size = batch_size
    while size < task_rows:
        sizes = [size] * num_threads + sizes
        size *= 2
    num_left = max(0, num_rows - sum(sizes))
    sizes = [task_rows] * (num_left // task_rows) + [num_left % task_rows] + sizes
    ends = np.minimum(np.cumsum([0, *sizes]), num_rows)
    return np.unique(ends)


def rows_per_file(num_images: int, rows_per_task: int, commit_rows: int) -> int:
    """Return the number of rows per file: whole tasks, but few enough that results appear during the run.

    Args:
        num_images: Number of images of the run.
        rows_per_task: Number of rows per task, and so per block.
        commit_rows: Maximum number of rows per file.
    """
    rows = min(commit_rows, max(rows_per_task, num_images // MIN_FILES_PER_RUN))
    # Ray would write the rest of a split block as a separate file.
    return rows // rows_per_task * rows_per_task or rows


class Tasks(NamedTuple):
    """Division of the rows of a run into tasks.

    Attributes:
        num_rows: Number of rows per task, except for the last tasks.
        starts: Position at which each task begins, followed by the end of the last task.
    """

    num_rows: int
    starts: NDArray[np.int64]


def plan_tasks(num_rows: int, batch_size: int, num_threads: int, max_rows: int = MAX_ROWS_PER_TASK) -> Tasks:
    """Divide a run into tasks. The arguments are those of `rows_per_task`."""
    task_rows = rows_per_task(num_rows, batch_size, num_threads, max_rows)
    return Tasks(task_rows, cut_into_tasks(num_rows, task_rows, batch_size, num_threads))


@dataclass(frozen=True)
class TableSource:
    """Source that reads its rows from a table.

    Attributes:
        table: Table with `id`, `uri` and the locators of the reader.
        starts: Task boundaries, as in `Tasks`.
    """

    table: pa.Table
    starts: NDArray[np.int64]

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.starts) - 1

    def rows_of(self, task: int) -> pa.Table:
        """Return the rows of one task."""
        start, stop = self.starts[task : task + 2].tolist()
        return self.table.slice(start, stop - start)


class PendingInputs:
    """Source of the manifest rows that an output does not contain yet.

    Args:
        manifest: Manifest of the output.
        done: Ids that the output contains.
        retried: Ids of failed rows that are retried. Their objects may have been replaced since they were listed.
        starts: Task boundaries over the pending rows, as in `Tasks`.
    """

    def __init__(self, manifest: Manifest, done: IdSet, retried: IdSet, starts: NDArray[np.int64]) -> None:
        self._manifest = manifest
        self._done, self._retried = done, retried
        self._starts: NDArray[np.int64] = np.append(done.missing_at(starts[:-1]), done.size)

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self._starts) - 1

    def rows_of(self, task: int) -> pa.Table:
        """Return the manifest rows of one task. Retried rows have an empty `etag`, which is not checked."""
        start, stop = self._starts[task : task + 2].tolist()
        rows = self._manifest.rows(self._done.missing(start, stop))
        is_retried = pa.array(self._retried.contains(rows["id"].to_numpy()))
        position = rows.column_names.index("etag")  # readers choose the order of their columns
        return rows.set_column(position, "etag", pc.if_else(is_retried, "", rows["etag"]))


@dataclass(frozen=True)
class FetchTask:
    """Callable that maps the number of a task to its images.

    Attributes:
        source: Reference to the source in the object store.
        first_task: Number of the first task of the dataset.
        decode: Fetch and decode stage.
    """

    source: "ray.ObjectRef[Source]"
    first_task: int
    decode: FetchAndDecode

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fetch and decode the rows of one task.

        Args:
            batch: Table with one row, whose `id` is the task number relative to `first_task`.

        Returns:
            Table of `IMAGES` and the carried columns.
        """
        (number,) = batch["id"].to_pylist()
        return self.decode(ray.get(self.source).rows_of(self.first_task + number))
