"""The images of a batch as one tensor, decoded on the device where they come as JPEG. Rows 1:1."""

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

# Decoded at a time, in full size: 0.8 GB of RGB.
MAX_PIXELS_IN_HAND = 2**28


class PixelLoader:
    """From a table to pixels.

    Args:
        transform: the eval transform.
        max_pixels: largest image decoded; None where all come decoded.
        accelerator: decodes, on a stream of its own, because nvJPEG may write at any time to memory that work on the
            same stream takes for free.
    """

    def __init__(self, transform: EvalTransform, max_pixels: int | None, accelerator: Accelerator) -> None:
        self._input_size, self._accelerator = transform.input_size, accelerator
        self._side_stream = accelerator.side_stream()
        self._turn = threading.Lock()  # one thread of a replica at a time, for the same reason
        if max_pixels is not None:
            from pipelines.images.device import DeviceDecoder  # late: torchvision

            self._decode = DeviceDecoder(transform, max_pixels, accelerator.device)

    def __call__(self, batch: pa.Table) -> tuple[pa.Table, torch.Tensor]:
        """`IMAGES`, and rows x height x width x 3 uint8 of those without an error.

        JPEGs that cannot be decoded become errors. Where there are JPEGs, all pixels lie on the device, else on the
        host.
        """
        has_errors = batch["error_kind"].null_count < len(batch)
        good = batch.filter(pc.is_null(batch["error_kind"])) if has_errors else batch  # to filter is to copy
        if good["jpeg"].null_count == len(good):
            return batch, torch.from_numpy(_stack(good["image"], self._input_size))
        errors: dict[int, ItemError] = {}
        with self._turn, metrics.timed("decode"):
            pixels = self._accelerator.retry_with_freed_memory(
                lambda: self._side_stream.run(lambda: self._load(good, errors))
            )
        return with_errors(batch, {good["id"][position].as_py(): error for position, error in errors.items()}), pixels

    def _load(self, good: pa.Table, errors: dict[int, ItemError]) -> torch.Tensor:
        """The pixels of these rows; the position of each that has none, and why, is what `errors` then holds."""
        errors.clear()  # those of a try that ran out of memory
        is_jpeg = pc.is_valid(good["jpeg"]).to_numpy()
        uploaded = torch.from_numpy(_stack(good["image"].drop_null(), self._input_size)).to(self._accelerator.device)
        images: list[torch.Tensor | None] = [None] * len(good)
        for position, image in zip(np.flatnonzero(~is_jpeg), uploaded):
            images[position] = image
        encoded = np.flatnonzero(is_jpeg)
        num_pixels = np.multiply(good["width"].to_numpy(), good["height"].to_numpy(), dtype=np.int64)[encoded]
        for positions in (encoded[group] for group in cut_by_pixels(num_pixels)):
            for position, found in zip(positions, self._decode(good["jpeg"].take(positions).to_pylist())):
                if isinstance(found, ItemError):
                    errors[int(position)] = found
                else:
                    images[position] = found
        pixels = [image for image in images if image is not None]
        return torch.stack(pixels) if pixels else uploaded


def cut_by_pixels(num_pixels: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Positions of images of so many pixels each, in groups that are small enough to be decoded at a time."""
    groups = np.cumsum(num_pixels) // MAX_PIXELS_IN_HAND
    return (np.flatnonzero(groups == group) for group in np.unique(groups))


def with_errors(batch: pa.Table, errors: dict[int, ItemError]) -> pa.Table:
    """The batch, with an error in the rows of these ids."""
    if not errors:
        return batch
    ids = batch["id"].to_pylist()
    for name, field in (("error_kind", "kind"), ("error_message", "message")):
        values = batch[name].to_pylist()
        said = [getattr(errors[one], field) if one in errors else value for one, value in zip(ids, values)]
        batch = batch.set_column(batch.column_names.index(name), name, pa.array(said, pa.string()))
    return batch


def _stack(column: pa.ChunkedArray, input_size: tuple[int, int]) -> NDArray[np.uint8]:
    """The images as rows x height x width x 3; a view of Arrow's memory where the rows are in one piece."""
    combined = column.combine_chunks()
    image = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) and combined.num_chunks else combined
    if not len(image):
        return np.zeros((0, *input_size, 3), np.uint8)
    offsets = np.frombuffer(image.buffers()[1], np.int64)[image.offset : image.offset + len(image) + 1]
    pixels = np.frombuffer(image.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    return pixels.reshape(-1, *input_size, 3)
