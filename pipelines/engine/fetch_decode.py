"""Fetch and decode: rows of the manifest to uint8 images of the model's input size, or to JPEGs for a GPU.

Both happen in one task, so that the encoded bytes and the full-size image never leave the process; decoding goes on
while the rest of the batch is in flight. Rows 1:1.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.engine.config import EngineConfig
from pipelines.engine.schema import IMAGES
from pipelines.errors import ItemError
from pipelines.images.jpeg import size_for_device
from pipelines.images.preprocess import Mode, Preprocess, make_preprocess
from pipelines.images.transform import EvalTransform
from pipelines.inputs.files import FilesReader
from pipelines.inputs.reader import Reader
from pipelines.runtime import metrics


@dataclass(frozen=True)
class FetchAndDecode:
    """One batch of the manifest to images.

    Attributes:
        transform: the eval transform.
        max_bytes: largest object fetched.
        max_pixels: largest image decoded.
        mode: of preprocessing.
        reader: reads the bytes.
    """

    transform: EvalTransform
    max_bytes: int
    max_pixels: int
    mode: Mode
    reader: Reader = field(default_factory=FilesReader)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read and decode rows of a manifest.

        Args:
            batch: `id`, `uri`, the locators of the reader, `etag` if there is one, and carried columns.

        Returns:
            `IMAGES` and the carried columns, in the same order. A failed image becomes a row with its error; so does
            one whose etag is no longer the given one.
        """
        preprocess = make_preprocess(self.mode, self.transform, self.max_pixels)
        rows: list[dict[str, Any]] = [{}] * len(batch)
        # Each image is copied once, to where Arrow's column has it.
        pixels = np.empty((len(batch), *self.transform.input_size, 3), np.uint8)
        started, decode_s = time.monotonic(), 0.0
        for fetched in self.reader.read(batch, self.max_bytes):
            decode_started = time.monotonic()
            row = self.row_of(fetched.content, preprocess, pixels[fetched.position])
            rows[fetched.position] = {"num_retries": fetched.num_retries, **row}
            decode_s += time.monotonic() - decode_started
            metrics.count("ecaray_fetched_bytes", len(fetched.content) if isinstance(fetched.content, bytes) else 0)
        metrics.count("ecaray_stage_seconds", decode_s, stage="decode")
        metrics.count("ecaray_stage_seconds", time.monotonic() - started - decode_s, stage="fetch")
        columns = {name: [row.get(name) for row in rows] for name in IMAGES.names[2:]}
        columns["image"] = _column_of(pixels, np.array([row["has_pixels"] for row in rows], np.bool_))
        images = pa.table({"id": batch["id"], "uri": batch["uri"], **columns}, schema=IMAGES)
        for name in batch.column_names:
            if name not in {*IMAGES.names, "etag", *self.reader.locators}:
                images = images.append_column(batch.schema.field(name), batch[name])
        return images

    def row_of(self, content: bytes | ItemError, preprocess: Preprocess, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """Return one image's columns of `IMAGES` that have a value, and `has_pixels` in place of `image`.

        Args:
            content: Its bytes, or why there are none.
            preprocess: Of `make_preprocess`.
            pixels: height x width x 3 of the model's input size, to be written to.
        """
        if isinstance(content, ItemError):
            return {"has_pixels": False, "error_kind": content.kind, "error_message": content.message}
        if self.mode == "cuda" and (size := size_for_device(content, self.transform, self.max_pixels)):
            return {"has_pixels": False, "width": size.width, "height": size.height, "jpeg": content}
        try:
            width, height, pixels[:], is_clipped = preprocess(content)
        except ItemError as error:
            return {"has_pixels": False, "error_kind": error.kind, "error_message": error.message}
        return {"has_pixels": True, "width": width, "height": height, "is_clipped": is_clipped}


def make_decode(config: EngineConfig, transform: EvalTransform, reader: Reader) -> FetchAndDecode:
    """Return the first stage of a job."""
    preprocess = config.preprocess
    return FetchAndDecode(transform, config.input.max_bytes, preprocess.max_pixels, preprocess.mode, reader)


def _column_of(pixels: NDArray[np.uint8], is_there: NDArray[np.bool_]) -> pa.LargeBinaryArray:
    """Rows x height x width x 3 as the `image` of `IMAGES`, null where there is none; a view where all are there."""
    sizes = np.where(is_there, pixels[0].size if len(pixels) else 0, 0)
    there = pixels if is_there.all() else pixels[is_there]
    buffers = (np.packbits(is_there, bitorder="little"), np.append(0, np.cumsum(sizes)), there)
    return pa.Array.from_buffers(pa.large_binary(), len(is_there), [pa.py_buffer(part) for part in buffers])
