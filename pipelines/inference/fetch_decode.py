"""Fetch and decode: rows of the manifest to uint8 images of the model's input size, or to JPEGs for a GPU.

Both happen in one task, so that the encoded bytes and the full-size image never leave the process; decoding goes on
while the rest of the batch is in flight. Rows 1:1.
"""

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import metrics
from pipelines.errors import ItemError
from pipelines.images.jpeg import size_for_device
from pipelines.images.preprocess import Mode, Preprocess, make_preprocess
from pipelines.images.transform import EvalTransform
from pipelines.inference.schema import IMAGES
from pipelines.storage.bulk import fetch_many


@dataclass(frozen=True)
class FetchAndDecode:
    """One batch of the manifest to images.

    Attributes:
        transform: the eval transform.
        max_bytes: largest object fetched.
        max_pixels: largest image decoded.
        mode: of preprocessing.
    """

    transform: EvalTransform
    max_bytes: int
    max_pixels: int
    mode: Mode

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`id` and `uri` to `IMAGES`, in the same order; a failed image becomes a row with its error."""
        preprocess = make_preprocess(self.mode, self.transform, self.max_pixels)
        object_uris = batch["uri"].to_pylist()
        rows: list[dict[str, Any]] = [{}] * len(object_uris)
        started, decode_s = time.monotonic(), 0.0
        for fetched in fetch_many(object_uris, self.max_bytes):
            decode_started = time.monotonic()
            rows[fetched.position] = {"num_retries": fetched.num_retries, **self.row_of(fetched.content, preprocess)}
            decode_s += time.monotonic() - decode_started
            metrics.count("ecaray_fetched_bytes", len(fetched.content) if isinstance(fetched.content, bytes) else 0)
        metrics.count("ecaray_stage_seconds", decode_s, stage="decode")
        metrics.count("ecaray_stage_seconds", time.monotonic() - started - decode_s, stage="fetch")
        columns = {name: [row.get(name) for row in rows] for name in IMAGES.names[2:]}
        return pa.table({"id": batch["id"], "uri": batch["uri"], **columns}, schema=IMAGES)

    def row_of(self, content: bytes | ItemError, preprocess: Preprocess) -> dict[str, Any]:
        """Of one image: the columns of `IMAGES` after `num_retries`; those without a value may be missing."""
        if isinstance(content, ItemError):
            return {"error_kind": content.kind, "error_message": content.message}
        if self.mode == "cuda" and (size := size_for_device(content, self.transform, self.max_pixels)):
            return {"width": size.width, "height": size.height, "jpeg": content}
        try:
            width, height, pixels = preprocess(content)
        except ItemError as error:
            return {"error_kind": error.kind, "error_message": error.message}
        return {"width": width, "height": height, "image": pixels.tobytes()}
