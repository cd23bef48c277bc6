"""Pixels of a batch as one tensor. Images that arrive as JPEG are decoded on the device. Rows map 1:1."""

import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipelines.errors import ItemError
from pipelines.images.transform import EvalTransform
from pipelines.models.accelerators import Accelerator
from pipelines.runtime import metrics

# Limit for one call of the decoder: 0.8 GB of full-size RGB.
MAX_PIXELS_PER_DECODE = 2**28


class PixelLoader:
    """Callable that loads the pixels of a table into one tensor.

    Args:
        transform: Eval transform.
        max_pixels: Number of pixels of the largest image that is decoded; None if all images arrive decoded.
        accelerator: Device that decodes. It uses a separate stream, because nvJPEG may still write to memory that
            later work on the same stream considers free.
    """

    def __init__(self, transform: EvalTransform, max_pixels: int | None, accelerator: Accelerator) -> None:
        self._input_size, self._accelerator = transform.input_size, accelerator
        self._side_stream = accelerator.side_stream()
        self._lock = threading.Lock()  # threads of a replica take turns, for the same reason
        if max_pixels is not None:
            from pipelines.images.device import DeviceDecoder  # late: torchvision

            self._decode = DeviceDecoder(transform, max_pixels, accelerator)

    def __call__(self, batch: pa.Table) -> tuple[pa.Table, torch.Tensor]:
        """Load the pixels of a batch of `IMAGES`.

        Returns:
            The batch, with an error for every JPEG that could not be decoded, and the pixels of the rows without an
            error: uint8, rows x height x width x 3, on the device if the batch contains JPEGs, otherwise on the host.
        """
        has_errors = batch["error_kind"].null_count < len(batch)
        good = batch.filter(pc.is_null(batch["error_kind"])) if has_errors else batch  # filtering copies the pixels
        if good["jpeg"].null_count == len(good):
            return batch, torch.from_numpy(_stack(good["image"], self._input_size))
        errors: dict[int, ItemError] = {}
        with self._lock, metrics.timed("decode"):
            pixels = self._accelerator.retry_with_freed_memory(
                lambda: self._side_stream.run(lambda: self._load(good, errors))
            )
        return with_errors(batch, {good["id"][position].as_py(): error for position, error in errors.items()}), pixels

    def _load(self, good: pa.Table, errors: dict[int, ItemError]) -> torch.Tensor:
        """Return the pixels of the rows that can be decoded, and store the errors of the others by position."""
        errors.clear()  # of an earlier attempt that ran out of memory
        is_jpeg = pc.is_valid(good["jpeg"]).to_numpy()
        uploaded = torch.from_numpy(_stack(good["image"].drop_null(), self._input_size)).to(self._accelerator.device)
        images: list[torch.Tensor | None] = [None] * len(good)
        for position, image in zip(np.flatnonzero(~is_jpeg), uploaded):
            images[position] = image
        encoded = np.flatnonzero(is_jpeg)
        num_pixels = np.multiply(good["width"].to_numpy(), good["height"].to_numpy(), dtype=np.int64)[encoded]
        for positions in (encoded[group] for group in group_by_pixels(num_pixels)):
            for position, found in zip(positions, self._decode(good["jpeg"].take(positions).to_pylist())):
                if isinstance(found, ItemError):
                    errors[int(position)] = found
                else:
                    images[position] = found
        pixels = [image for image in images if image is not None]
        return torch.stack(pixels) if pixels else uploaded


def group_by_pixels(num_pixels: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Return the positions of images in groups that are small enough for one call of the decoder.

    Args:
        num_pixels: Number of pixels of each image.
    """
    groups = np.cumsum(num_pixels) // MAX_PIXELS_PER_DECODE
    return (np.flatnonzero(groups == group) for group in np.unique(groups))


def with_errors(batch: pa.Table, errors: dict[int, ItemError]) -> pa.Table:
    """Return the batch with errors added.

    Args:
        batch: Table with the columns of `IMAGES`.
        errors: Error of each failed row, by id.
    """
    if not errors:
        return batch
    ids = batch["id"].to_pylist()
    for name, field in (("error_kind", "kind"), ("error_message", "message")):
        values = batch[name].to_pylist()
        updated = [getattr(errors[id_], field) if id_ in errors else value for id_, value in zip(ids, values)]
        batch = batch.set_column(batch.column_names.index(name), name, pa.array(updated, pa.string()))
    return batch


def _stack(column: pa.ChunkedArray, input_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the images as rows x height x width x 3; a view of Arrow's memory if the column is contiguous."""
    combined = column.combine_chunks()
    image = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) and combined.num_chunks else combined
    if not len(image):
        return np.zeros((0, *input_size, 3), np.uint8)
    offsets = np.frombuffer(image.buffers()[1], np.int64)[image.offset : image.offset + len(image) + 1]
    pixels = np.frombuffer(image.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    return pixels.reshape(-1, *input_size, 3)
