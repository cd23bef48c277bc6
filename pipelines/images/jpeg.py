"""What a JPEG's header says, read without decoding, and without torch."""

from collections.abc import Container
from typing import NamedTuple

import simplejpeg

from pipelines.errors import ItemError
from pipelines.images.transform import EvalTransform

MAGIC, END = b"\xff\xd8\xff", b"\xff\xd9"
# Of torch's antialiased filters; Pillow has more.
TORCH_FILTERS = ("bicubic", "bilinear")
# Converted to RGB by libjpeg-turbo, and by GPUs, which take three components for YCbCr whatever the file says of them.
COLORSPACES, DEVICE_COLORSPACES = ("YCbCr", "Gray", "RGB"), ("YCbCr", "Gray")
# What is larger is scaled in the DCT by a CPU, which moves far fewer pixels: a batch in full size fills a GPU's memory,
# and a task's files a node's.
MAX_DEVICE_PIXELS, MAX_DEVICE_BYTES = 2**24, 2**19


class Size(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int


def read_size(content: bytes, max_pixels: int, colorspaces: Container[str] = COLORSPACES) -> Size:
    """The size of a JPEG that the decoder at hand converts to RGB.

    Args:
        content: the bytes of a file.
        max_pixels: largest image decoded.
        colorspaces: those that the decoder converts.

    Raises:
        ItemError: `too_many_pixels`.
        ValueError: Pillow has to decode it, or to say what is wrong with it.
    """
    if not content.startswith(MAGIC):
        raise ValueError("no JPEG")
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    if colorspace not in colorspaces:
        raise ValueError(f"{colorspace} is converted by Pillow")
    if width * height > max_pixels:
        raise ItemError("too_many_pixels", f"{width} x {height} pixels, more than preprocess.max_pixels = {max_pixels}")
    return Size(width, height)


def size_for_device(content: bytes, transform: EvalTransform, max_pixels: int) -> Size | None:
    """The size of a JPEG that a GPU may decode, resize and crop; None where a CPU does that better, or says why not.

    Args:
        content: the bytes of a file.
        transform: the eval transform.
        max_pixels: largest image decoded, and largest size resized to.
    """
    # A GPU's decoder fills up what is missing of a file, and says nothing.
    is_whole = content.rstrip(b"\0").endswith(END)
    if not is_whole or len(content) > MAX_DEVICE_BYTES or transform.interpolation not in TORCH_FILTERS:
        return None
    try:
        size = read_size(content, min(max_pixels, MAX_DEVICE_PIXELS), DEVICE_COLORSPACES)
        resized_width, resized_height = transform.resized_size(*size, max_pixels)
    except (ItemError, ValueError):
        return None
    crop_height, crop_width = transform.input_size
    return size if resized_width >= crop_width and resized_height >= crop_height else None
