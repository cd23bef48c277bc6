"""Local batches: one worker's part of a global batch, loaded from ids to uint8 images in Ray tasks. Rows 1:N.

Local batches have the same number of rows on every worker. An image that cannot be read or decoded keeps its row, with
an error message and blank pixels; a short local batch is padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pipelines.errors import ItemError
from pipelines.images.decode import decoded
from pipelines.inputs.reader import Reader
from pipelines.training.augment import Pixels

PADDING_ID = -1


class Sampler(Protocol):
    """Sampler that chooses the images of each local batch."""

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return the ids of one worker's local batch of one step."""
        ...


@dataclass(frozen=True)
class SequentialSampler:
    """Sampler for validation: every image once, in ascending order of the ids.

    Attributes:
        num_images: Number of images in the set.
        batch_size: Number of images per step and worker.
    """

    num_images: int
    batch_size: int

    def num_steps(self, world_size: int) -> int:
        """Return the number of steps that cover the set. The last local batches may be short or empty."""
        return -(-self.num_images // (self.batch_size * world_size))

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return the ids of one worker's local batch of one step, the same in every epoch."""
        start = (step * world_size + rank) * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_images), dtype=np.int64)


@dataclass(frozen=True)
class LocalBatchLoader:
    """Loader that fetches, decodes and transforms local batches.

    Attributes:
        sampler: Sampler that chooses the images of each local batch.
        num_rows: Number of rows in every local batch, padding included.
        pixels: Transform from an RGB image to uint8.
        input_size: Height and width of the result, in pixels.
        world_size: Number of workers.
        max_bytes: Size limit of a fetched object, in bytes.
        max_pixels: Size limit of a decoded image, in pixels.
        reader: Reader of the images.
    """

    sampler: Sampler
    num_rows: int
    pixels: Pixels
    input_size: tuple[int, int]
    world_size: int
    max_bytes: int
    max_pixels: int
    reader: Reader

    def load(self, images: pa.Table, epoch: int, step: int, rank: int) -> dict[str, NDArray[Any]]:
        """Load one local batch.

        Args:
            images: Table of `uri`, the reader's locator columns and `target`. The id of an image is its row.
            epoch: Epoch, from 0.
            step: Step within the epoch, from 0.
            rank: Rank of the worker.

        Returns:
            `epoch`, `step`, `rank` (the same in all rows), `id` (`PADDING_ID` in padding rows), `image` (num_rows x
            height x width x 3, uint8), `target` (int64) and `error` (text; empty for good rows).
        """
        ids = self.sampler.local_batch(epoch, step, rank, self.world_size)
        assert len(ids) <= self.num_rows
        rows = images.take(pa.array(ids))
        result: dict[str, NDArray[Any]] = {
            name: np.full(self.num_rows, value, np.int64)
            for name, value in (("epoch", epoch), ("step", step), ("rank", rank), ("id", PADDING_ID), ("target", 0))
        }
        result["id"][: len(ids)] = ids
        result["target"][: len(ids)] = rows["target"].to_numpy()
        result["image"] = np.zeros((self.num_rows, *self.input_size, 3), np.uint8)
        errors = [""] * self.num_rows
        for position, content, _ in self.reader.read(rows, self.max_bytes):
            try:
                result["image"][position] = self._decode(content, epoch, int(ids[position]))
            except ItemError as error:
                errors[position] = f"{error.kind}: {error.message}"
        result["error"] = np.array(errors, dtype=object)
        return result

    def _decode(self, content: bytes | ItemError, epoch: int, index: int) -> NDArray[np.uint8]:
        if isinstance(content, ItemError):
            raise content
        with decoded(content, self.max_pixels) as image:
            return self.pixels(image, epoch, index)


@dataclass(frozen=True)
class LocalBatchTask:
    """Ray Data UDF that loads the local batches of one worker for some consecutive steps.

    Attributes:
        loader: Loader of the local batches.
        images: `uri` and `target` of the set, in the object store.
        first_step: First step of the dataset, counted over all epochs.
        num_steps: Number of steps in the dataset.
        steps_per_task: Number of steps of a task; the last tasks may have fewer.
        steps_per_epoch: Number of steps in an epoch.
    """

    loader: LocalBatchLoader
    images: "ray.ObjectRef[pa.Table]"
    first_step: int
    num_steps: int
    steps_per_task: int
    steps_per_epoch: int

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Load the local batches of one task, in order of their steps.

        Args:
            batch: `id`, one value: the position of the task in the dataset, where groups of steps follow each other
                and each group has one task per worker, in order of rank.
        """
        (place,) = batch["id"].tolist()
        group, rank = divmod(place, self.loader.world_size)
        images = ray.get(self.images)
        start = group * self.steps_per_task
        for step in range(start, min(start + self.steps_per_task, self.num_steps)):
            yield self.loader.load(images, *divmod(self.first_step + step, self.steps_per_epoch), rank)
