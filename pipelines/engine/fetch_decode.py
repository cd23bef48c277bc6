"""Fetch and decode stage: rows of the manifest to uint8 images of the model's input size, or to JPEGs for a GPU.

One task does both, so that encoded bytes and full-size images never leave the process. Decoding overlaps with the
requests that are still in flight. Rows map 1:1.
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
    """Callable that fetches and decodes one batch of the manifest.

    Attributes:
        transform: Eval transform.
        max_bytes: Size of the largest object that is fetched.
        max_pixels: Number of pixels of the largest image that is decoded.
        mode: Preprocessing mode.
        reader: Reader of the encoded bytes.
    """

    transform: EvalTransform
    max_bytes: int
    max_pixels: int
    mode: Mode
    reader: Reader = field(default_factory=FilesReader)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fetch and decode rows of a manifest.

        Args:
            batch: Table with `id`, `uri`, the locators of the reader, optionally `etag`, and carried columns.

        Returns:
            Table of `IMAGES` and the carried columns, in the same row order. An image that fails, or whose etag has
            changed, becomes a row with an error.
        """
        preprocess = make_preprocess(self.mode, self.transform, self.max_pixels)
        rows: list[dict[str, Any]] = [{}] * len(batch)
        # The Arrow column is built on this buffer, so that each image is copied only once.
        pixels = np.empty((len(batch), *self.transform.input_size, 3), np.uint8)
        started, decode_s = time.monotonic(), 0.0
        for fetched in self.reader.read(batch, self.max_bytes):
            decode_started = time.monotonic()
            row = self.decode_row(fetched.content, preprocess, pixels[fetched.position])
            rows[fetched.position] = {"num_retries": fetched.num_retries, **row}
            decode_s += time.monotonic() - decode_started
            metrics.count("ecaray_fetched_bytes", len(fetched.content) if isinstance(fetched.content, bytes) else 0)
        metrics.count("ecaray_stage_seconds", decode_s, stage="decode")
        metrics.count("ecaray_stage_seconds", time.monotonic() - started - decode_s, stage="fetch")
        columns = {name: [row.get(name) for row in rows] for name in IMAGES.names[2:]}
        columns["image"] = _image_column(pixels, np.array([row["has_pixels"] for row in rows], np.bool_))
        images = pa.table({"id": batch["id"], "uri": batch["uri"], **columns}, schema=IMAGES)
        for name in batch.column_names:
            if name not in {*IMAGES.names, "etag", *self.reader.locators}:
                images = images.append_column(batch.schema.field(name), batch[name])
        return images

    def decode_row(
        self, content: bytes | ItemError, preprocess: Preprocess, pixels: NDArray[np.uint8]
    ) -> dict[str, Any]:
        """Decode one image into `pixels`.

        Args:
            content: Encoded bytes of the image, or the error of the fetch.
            preprocess: Result of `make_preprocess`.
            pixels: Output buffer, height x width x 3 of the model's input size.

        Returns:
            Non-null values of the row by their column in `IMAGES`, with `has_pixels` in place of `image`.
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
    """Return the fetch and decode stage of a job."""
    preprocess = config.preprocess
    return FetchAndDecode(transform, config.input.max_bytes, preprocess.max_pixels, preprocess.mode, reader)


def _image_column(pixels: NDArray[np.uint8], is_valid: NDArray[np.bool_]) -> pa.LargeBinaryArray:
    """Return the column `image` of `IMAGES`; a view of `pixels` if all rows are valid.

    Args:
        pixels: Images, rows x height x width x 3.
        is_valid: Mask of the rows that have an image. The others become null.
    """
    sizes = np.where(is_valid, pixels[0].size if len(pixels) else 0, 0)
    values = pixels if is_valid.all() else pixels[is_valid]
    buffers = (np.packbits(is_valid, bitorder="little"), np.append(0, np.cumsum(sizes)), values)
    return pa.Array.from_buffers(pa.large_binary(), len(is_valid), [pa.py_buffer(part) for part in buffers])
