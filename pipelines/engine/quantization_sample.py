"""Sample of a job's input images that its model is quantized with."""

import logging
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.errors import RequestError
from pipelines.runtime.cpu import why_no_int8

log = logging.getLogger(__name__)


def refuse_unsupported_int8(use_gpu: bool, is_cluster: bool) -> None:
    """Refuse int8 if it is known to be unsupported.

    Args:
        use_gpu: True if replicas run on GPUs.
        is_cluster: True if replicas may run on other machines than this one.

    Raises:
        RequestError: Replicas run on GPUs, or this machine cannot run int8.
    """
    if use_gpu:
        raise RequestError("model.dtype = int8 runs on CPUs only: use bfloat16 or float16 on GPUs")
    reason = None if is_cluster else why_no_int8()
    if reason:
        raise RequestError(f"this machine cannot run model.dtype = int8: {reason}")


def evenly_spaced(num_rows: int, count: int) -> NDArray[np.int64]:
    """Return up to `count` positions, evenly spaced over `num_rows` rows."""
    return np.unique(np.linspace(0, num_rows - 1, min(count, num_rows)).astype(np.int64))


class Sample(NamedTuple):
    """Images of the input.

    Attributes:
        images: Decoded images, num_images x H x W x 3, uint8.
        ids: Ids of their rows, in the same order.
    """

    images: NDArray[np.uint8]
    ids: list[int]


def read_sample(rows: pa.Table, decode: FetchAndDecode, is_pinned: bool = False) -> Sample:
    """Read the images of some rows. Images that cannot be read are skipped.

    Args:
        rows: Table with `id`, `uri` and the locators of the reader. An `etag` is ignored.
        decode: Fetch and decode stage of the run.
        is_pinned: True if an earlier run quantized with exactly these images, so that none may be missing.

    Raises:
        RequestError: No image, or not every pinned image, can be read.
    """
    log.info("int8: sampling %d images of the input", rows.num_rows)
    images = decode(rows.select([name for name in rows.column_names if name != "etag"]))
    good, failed = images.filter(pc.is_valid(images["image"])), images.filter(pc.is_null(images["image"]))
    if failed.num_rows and (is_pinned or not good.num_rows):
        uri, kind, message = (failed[name][0].as_py() for name in ("uri", "error_kind", "error_message"))
        which = "images that this output's int8 model was quantized with" if is_pinned else "images of the input"
        raise RequestError(f"cannot read {failed.num_rows} {which}, such as {uri}: {kind}: {message}")
    pixels = [np.frombuffer(image, np.uint8) for image in good["image"].to_pylist()]
    return Sample(np.stack(pixels).reshape(-1, *decode.transform.input_size, 3), good["id"].to_pylist())
