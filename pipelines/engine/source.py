"""What goes into the chain, task by task: a task's rows are made where the task runs.

Were the driver to cut the manifest into blocks and hand them to Ray, ten million images would be half a million objects
of its own, and minutes before the first of them is fetched.
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

# Ray's own work for a task (35 ms of a core) is that for some images, but the last tasks leave threads idle: with 16, 8
# and 4 tasks for each of two threads, 1,000 images took 0.97, 0.95 and 0.97 of the time with 31. In the end so many
# batches a task that Ray can hold all tasks.
MIN_TASKS_PER_THREAD, QUICK_TASK_ROWS = 7, 128
# A task has one more batch for each of so many rows of a run: 16,384 tasks of CPUs, or 1,024 of GPUs, whose batches are
# large and soon done, are enough to keep all busy, and few enough for the driver (benchmarks/sizing.py).
ROWS_PER_BATCH_OF_A_TASK = 262_144
MAX_ROWS_PER_TASK = 1024
# A small run is cut into at least this many files.
MIN_FILES_PER_RUN = 16


class Source(Protocol):
    """Rows by task."""

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""

    def rows_of(self, task: int) -> pa.Table:
        """`id` and `uri` of one task."""


def rows_per_task(num_rows: int, batch_size: int, num_threads: int, max_rows: int = MAX_ROWS_PER_TASK) -> int:
    """Whole batches of the model: one in small runs, more in large ones.

    Args:
        num_rows: of the run.
        batch_size: of the model.
        num_threads: of all replicas.
        max_rows: of a task, where that is a batch or more.
    """
    max_rows = min(max_rows, MAX_ROWS_PER_TASK)
    enough = -(-num_rows // ROWS_PER_BATCH_OF_A_TASK)
    quick = min(QUICK_TASK_ROWS, num_rows // (MIN_TASKS_PER_THREAD * num_threads)) // batch_size
    return batch_size * max(1, min(max(enough, quick), max_rows // batch_size))


def cut_into_tasks(num_rows: int, task_rows: int, batch_size: int, num_threads: int) -> NDArray[np.int64]:
    """Where each task begins, and where the last one ends.

    The last tasks get smaller and smaller, down to a batch: while one thread has the last large one, the others would
    have nothing to do. Guided self-scheduling, https://doi.org/10.1109/TC.1987.5009495, with sizes that halve.

    Args:
        num_rows: of the run.
        task_rows: of a task, but of the last ones.
        batch_size: of the model.
        num_threads: of all replicas.
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
    """Rows of a file: so many that none is a task's rest, so few that results appear while the run goes on.

    Args:
        num_images: of the run.
        rows_per_task: rows come in blocks of this many.
        commit_rows: at most.
    """
    rows = min(commit_rows, max(rows_per_task, num_images // MIN_FILES_PER_RUN))
    # What one write leaves of a block would become a file of its own.
    return rows // rows_per_task * rows_per_task or rows


class Tasks(NamedTuple):
    """How the rows of a run are cut into tasks.

    Attributes:
        num_rows: of a task, but of the last ones.
        starts: position at which each task begins, and at which the last one ends.
    """

    num_rows: int
    starts: NDArray[np.int64]


def plan_tasks(num_rows: int, batch_size: int, num_threads: int, max_rows: int = MAX_ROWS_PER_TASK) -> Tasks:
    """Cut a run into tasks; arguments as for `rows_per_task`."""
    task_rows = rows_per_task(num_rows, batch_size, num_threads, max_rows)
    return Tasks(task_rows, cut_into_tasks(num_rows, task_rows, batch_size, num_threads))


@dataclass(frozen=True)
class TableSource:
    """Rows of a table.

    Attributes:
        table: `id` and `uri`.
        starts: of `Tasks`.
    """

    table: pa.Table
    starts: NDArray[np.int64]

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.starts) - 1

    def rows_of(self, task: int) -> pa.Table:
        """`id` and `uri` of one task."""
        start, stop = self.starts[task : task + 2].tolist()
        return self.table.slice(start, stop - start)


class PendingInputs:
    """Rows of a manifest whose ids are missing in an output.

    Args:
        manifest: inputs of the output.
        done: ids that are not missing.
        retried: ids of failed rows that are retried: what they name may have been mended since it was listed.
        starts: of `Tasks`, for as many rows as are missing.
    """

    def __init__(self, manifest: Manifest, done: IdSet, retried: IdSet, starts: NDArray[np.int64]) -> None:
        self._manifest = manifest
        self._done, self._retried = done, retried
        self._starts: NDArray[np.int64] = np.append(done.missing_at(starts[:-1]), done.size)

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self._starts) - 1

    def rows_of(self, task: int) -> pa.Table:
        """Return `id`, `uri` and `etag` of one task; the etag is empty where it does not matter."""
        start, stop = self._starts[task : task + 2].tolist()
        rows = self._manifest.rows(self._done.missing(start, stop))
        is_retried = pa.array(self._retried.contains(rows["id"].to_numpy()))
        return rows.set_column(2, "etag", pc.if_else(is_retried, "", rows["etag"]))


@dataclass(frozen=True)
class FetchTask:
    """From the number of a task to its images.

    Attributes:
        source: in the object store.
        first_task: number of the first one.
        decode: fetches and decodes rows.
    """

    source: "ray.ObjectRef[Source]"
    first_task: int
    decode: FetchAndDecode

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`id`, the one number of a task counted from the first, to `IMAGES`."""
        (number,) = batch["id"].to_pylist()
        return self.decode(ray.get(self.source).rows_of(self.first_task + number))
