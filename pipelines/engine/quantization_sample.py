"""Images of a job's own input, by which its model is quantized."""

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


def refuse_if_unable(use_gpu: bool, is_cluster: bool) -> None:
    """Refuse int8 where it is known to be impossible.

    Args:
        use_gpu: whether replicas run on GPUs.
        is_cluster: replicas may run on other machines than this one.

    Raises:
        RequestError: it is.
    """
    if use_gpu:
        raise RequestError("model.dtype = int8 is for CPUs; on GPUs take bfloat16 or float16")
    reason = None if is_cluster else why_no_int8()
    if reason:
        raise RequestError(f"this machine cannot run model.dtype = int8: {reason}")


def every_nth(num_rows: int, count: int) -> NDArray[np.int64]:
    """Positions spread evenly over `num_rows` rows, `count` of them or all."""
    return np.unique(np.linspace(0, num_rows - 1, min(count, num_rows)).astype(np.int64))


class Sample(NamedTuple):
    """Images of the input.

    Attributes:
        images: num_images x H x W x 3, uint8.
        ids: of their rows, in order.
    """

    images: NDArray[np.uint8]
    ids: list[int]


def read_sample(rows: pa.Table, decode: FetchAndDecode, is_pinned: bool = False) -> Sample:
    """The images of some rows, those left out that cannot be had.

    Args:
        rows: `id`, `uri` and the locators of the reader; an `etag` does not matter.
        decode: the first stage of the run.
        is_pinned: an earlier run had all of them, and its rows follow from them.

    Raises:
        RequestError: none can be had, or one of those that are pinned cannot.
    """
    log.info("int8: sampling %d images of the input", rows.num_rows)
    images = decode(rows.select([name for name in rows.column_names if name != "etag"]))
    good, failed = images.filter(pc.is_valid(images["image"])), images.filter(pc.is_null(images["image"]))
    if failed.num_rows and (is_pinned or not good.num_rows):
        uri, kind, message = (failed[name][0].as_py() for name in ("uri", "error_kind", "error_message"))
        needed = "images that this output's int8 program was made by" if is_pinned else "images of the input"
        raise RequestError(f"{failed.num_rows} {needed} cannot be had, {uri} among them: {kind}: {message}")
    pixels = [np.frombuffer(image, np.uint8) for image in good["image"].to_pylist()]
    return Sample(np.stack(pixels).reshape(-1, *decode.transform.input_size, 3), good["id"].to_pylist())
