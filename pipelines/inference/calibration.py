"""Images of a job's own input, by which its model is quantized."""

import logging

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.cpu import why_no_int8
from pipelines.errors import RequestError
from pipelines.inference.fetch_decode import FetchAndDecode

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


def read_sample(object_uris: pa.Array, decode: FetchAndDecode) -> NDArray[np.uint8]:
    """The images at some URIs, those left out that cannot be had.

    Returns:
        num_images x H x W x 3.

    Raises:
        RequestError: none can.
    """
    log.info("int8: sampling %d images of the input", len(object_uris))
    ids = pa.array(range(len(object_uris)), pa.int64())
    images = decode(pa.table({"id": ids, "uri": object_uris}))
    pixels = [np.frombuffer(image, np.uint8) for image in images["image"].to_pylist() if image]
    if not pixels:
        kind, message = images["error_kind"][0].as_py(), images["error_message"][0].as_py()
        raise RequestError(f"int8 needs images of the input, and none of {len(images)} could be had: {kind}: {message}")
    return np.stack(pixels).reshape(-1, *decode.transform.input_size, 3)
