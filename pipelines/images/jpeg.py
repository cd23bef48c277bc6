"""Facts about a JPEG that are read without decoding it, and without torch."""

import re
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
MAX_SCANS = 100
"""Limit on the scans of one JPEG, as libtiff and GDAL have it. Each scan of a progressive JPEG goes over the whole
image again, however few bytes it has: 1,000 scans in 30 KB keep a core busy for 10 s. Encoders write about 10."""
# Any marker but stuffed zeros, restarts and fill bytes (ITU-T T.81, B.1.1.2).
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, NO_CONTENT = 0xD8, 0xD9, 0xDA, 0x01


class Size(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int


def read_size(content: bytes, max_pixels: int, colorspaces: Container[str] = COLORSPACES) -> Size:
    """Return the size of a JPEG that the decoder at hand converts to RGB.

    Args:
        content: The bytes of a file.
        max_pixels: Largest image decoded.
        colorspaces: Those that the decoder converts.

    Raises:
        ItemError: `too_many_pixels` or `too_slow`.
        ValueError: Pillow has to decode it, or to say what is wrong with it.
    """
    if not content.startswith(MAGIC):
        raise ValueError("no JPEG")
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    if colorspace not in colorspaces:
        raise ValueError(f"{colorspace} is converted by Pillow")
    if width * height > max_pixels:
        raise ItemError("too_many_pixels", f"{width} x {height} pixels, more than preprocess.max_pixels = {max_pixels}")
    refuse_many_scans(content)
    return Size(width, height)


def refuse_many_scans(content: bytes) -> None:
    """Refuse a JPEG whose decoding would take far longer than its size lets expect.

    Raises:
        ItemError: `too_slow`.
    """
    # A count of the marker's bytes is quick, and an upper bound: thumbnails and images behind the first have scans too.
    if content.count(bytes((0xFF, START_OF_SCAN))) > MAX_SCANS and count_scans(content) > MAX_SCANS:
        raise ItemError("too_slow", f"a JPEG of more than {MAX_SCANS} scans: each goes over the whole image again")


def has_coefficients_in_memory(content: bytes) -> bool:
    """Return whether decoding may hold all DCT coefficients at the same time, as it does for several scans."""
    return content.count(bytes((0xFF, START_OF_SCAN))) > 1


def count_scans(content: bytes) -> int:
    """Return the number of scans up to the end of the first image, or `MAX_SCANS` + 1 if there are more."""
    num_scans, position = 0, 0
    while num_scans <= MAX_SCANS and (found := MARKER.search(content, position)):
        marker, position = found[1][0], found.end()
        if marker == END_OF_IMAGE:
            break
        num_scans += marker == START_OF_SCAN
        if marker not in (START_OF_IMAGE, NO_CONTENT):
            position += int.from_bytes(content[position : position + 2], "big")
    return num_scans


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
