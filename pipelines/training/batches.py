"""A worker's share of a batch: from ids to uint8 images, in one Ray task. Rows 1:N.

Shares have the same number of rows on every worker, whatever fails: an image that cannot be had keeps its row, with the
error in the place of its pixels, and a share that is short of an image is filled up.
"""

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


class Order(Protocol):
    """Which images each share holds."""

    def share(self, epoch: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The ids of one worker's share of one step."""
        ...


@dataclass(frozen=True)
class SequentialSampler:
    """Each image once, in the order of the ids: for validation.

    Attributes:
        num_images: in the set.
        batch_size: images a step, for each worker.
    """

    num_images: int
    batch_size: int

    def num_steps(self, world_size: int) -> int:
        """Steps until every image has been in one; the last shares may be short or empty."""
        return -(-self.num_images // (self.batch_size * world_size))

    def share(self, epoch: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The ids of one worker's share of one step, the same in every epoch."""
        start = (step * world_size + rank) * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_images), dtype=np.int64)


@dataclass(frozen=True)
class LocalBatchLoader:
    """Fetches, decodes and transforms shares.

    Attributes:
        order: which images a share holds.
        num_rows: of every share, those that fill it up included.
        pixels: from RGB image to uint8.
        input_size: height and width of the result, in pixels.
        world_size: number of workers.
        max_bytes: largest object fetched.
        max_pixels: largest image decoded.
        reader: reads the images.
    """

    order: Order
    num_rows: int
    pixels: Pixels
    input_size: tuple[int, int]
    world_size: int
    max_bytes: int
    max_pixels: int
    reader: Reader

    def load(self, images: pa.Table, epoch: int, step: int, rank: int) -> dict[str, NDArray[Any]]:
        """One share.

        Args:
            images: `uri`, the locators of the reader, and `target`; an image's id is its row.
            epoch: from 0.
            step: within the epoch, from 0.
            rank: the worker's.

        Returns:
            `epoch`, `step`, `rank` (each the same in all rows), `id` (`PADDING_ID` in rows that fill up), `image`
            (num_rows x height x width x 3 uint8), `target` int64, `error` (text; empty where there is none).
        """
        ids = self.order.share(epoch, step, rank, self.world_size)
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
    """A `LocalBatchLoader` as Ray Data calls it, on one row that says which share.

    Attributes:
        loader: does the work.
        images: `uri` and `target` of the set, in the object store.
        first_step: of the dataset, counted over all epochs.
        steps_per_epoch: of the set.
    """

    loader: LocalBatchLoader
    images: "ray.ObjectRef[pa.Table]"
    first_step: int
    steps_per_epoch: int

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """`id` (one value: the share's place in the dataset, worker by worker, step by step) to one share."""
        (place,) = batch["id"].tolist()
        step, rank = divmod(place, self.loader.world_size)
        epoch, step = divmod(self.first_step + step, self.steps_per_epoch)
        return self.loader.load(ray.get(self.images), epoch, step, rank)
