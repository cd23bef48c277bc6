"""Inspection of JPEG files without decoding them, and without torch."""

import itertools
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

import simplejpeg

from pipelines.errors import ItemError
from pipelines.images.transform import EvalTransform

MAGIC, END = b"\xff\xd8\xff", b"\xff\xd9"
# Antialiased filters of torch. Pillow has more.
TORCH_FILTERS = ("bicubic", "bilinear")
# Color spaces that libjpeg-turbo and GPUs convert to RGB. GPUs treat any three components as YCbCr.
COLORSPACES, DEVICE_COLORSPACES = ("YCbCr", "Gray", "RGB"), ("YCbCr", "Gray")
# Larger images are left to a CPU, which scales them in the DCT and so handles far fewer pixels. At full size, a batch
# would fill a GPU's memory, and the files of a task a node's.
MAX_DEVICE_PIXELS, MAX_DEVICE_BYTES = 2**24, 2**19
MAX_SCANS = 100
"""Limit on the scans of one JPEG, the same as in libtiff and GDAL. Each scan of a progressive JPEG passes over the
whole image again, however few bytes it has: 1,000 scans in 30 KB keep a core busy for 10 s. Encoders write about 10."""
# Any marker except stuffed zeros, restarts and fill bytes (ITU-T T.81, B.1.1.2).
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, NO_CONTENT = 0xD8, 0xD9, 0xDA, 0x01
RESTART_INTERVAL, ADOBE = 0xDD, 0xEE
# Frame headers (SOFn), except the three numbers that other markers use.
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


class Coding(NamedTuple):
    """Properties of a JPEG that decide whether a decoder supports it.

    Attributes:
        frame: Marker of the frame header: baseline, progressive, arithmetic and so on (ITU-T T.81, table B.1).
        precision: Bits per sample.
        sampling: Horizontal and vertical sampling factor of each component, in one byte.
        has_restarts: True if the file has a restart interval.
        has_adobe_marker: True if the file has an Adobe marker, which may change the color transform.
    """

    frame: int
    precision: int
    sampling: bytes
    has_restarts: bool
    has_adobe_marker: bool


class Size(NamedTuple):
    """Size of an image, in pixels."""

    width: int
    height: int


def read_size(content: bytes, max_pixels: int, colorspaces: Container[str] = COLORSPACES) -> Size:
    """Return the size of a JPEG that a decoder can convert to RGB.

    Args:
        content: Bytes of a file.
        max_pixels: Size limit of the image, in pixels.
        colorspaces: Color spaces that the decoder can convert to RGB.

    Raises:
        ItemError: `too_many_pixels` or `too_slow`.
        ValueError: Pillow has to decode the file or to find its error.
    """
    if not content.startswith(MAGIC):
        raise ValueError("not a JPEG")
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    if colorspace not in colorspaces:
        raise ValueError(f"{colorspace} has to be converted by Pillow")
    if width * height > max_pixels:
        raise ItemError("too_many_pixels", f"{width} x {height} pixels, more than preprocess.max_pixels = {max_pixels}")
    refuse_many_scans(content)
    return Size(width, height)


def coding_of(content: bytes) -> Coding:
    """Return the coding of a JPEG, read from its headers. What the headers lack is 0, empty or False."""
    frame = precision = 0
    sampling, has_restarts, has_adobe_marker = b"", False, False
    for marker, start, end in _segments(content):
        if marker == START_OF_SCAN:
            break
        if marker in FRAMES:
            frame, precision = marker, int.from_bytes(content[start + 2 : start + 3], "big")
            sampling = content[start + 9 : end : 3]
        has_restarts |= marker == RESTART_INTERVAL and any(content[start + 2 : end])
        has_adobe_marker |= marker == ADOBE
    return Coding(frame, precision, sampling, has_restarts, has_adobe_marker)


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker of each segment of the first image, and the positions between which its content lies."""
    end = 0
    while (found := MARKER.search(content, end)) and found[1][0] != END_OF_IMAGE:
        marker, start = found[1][0], found.end()
        has_content = marker not in (START_OF_IMAGE, NO_CONTENT)
        end = start + (int.from_bytes(content[start : start + 2], "big") if has_content else 0)
        yield marker, start, end


def refuse_many_scans(content: bytes) -> None:
    """Reject a JPEG whose many scans would take far longer to decode than its size suggests.

    Raises:
        ItemError: `too_slow`.
    """
    # Counting the marker's bytes is fast, and an upper bound: thumbnails and further images in the file count too.
    if content.count(bytes((0xFF, START_OF_SCAN))) > MAX_SCANS and count_scans(content) > MAX_SCANS:
        raise ItemError("too_slow", f"a JPEG of more than {MAX_SCANS} scans, each of which passes over the whole image")


def has_coefficients_in_memory(content: bytes) -> bool:
    """Return whether decoding may hold all DCT coefficients in memory, as it does for files of several scans."""
    return content.count(bytes((0xFF, START_OF_SCAN))) > 1


def count_scans(content: bytes) -> int:
    """Return the number of scans up to the end of the first image, or `MAX_SCANS` + 1 if there are more."""
    scans = (marker for marker, _, _ in _segments(content) if marker == START_OF_SCAN)
    return sum(1 for _ in itertools.islice(scans, MAX_SCANS + 1))


def size_for_device(content: bytes, transform: EvalTransform, max_pixels: int) -> Size | None:
    """Return the size of a JPEG that a GPU can decode, resize and crop, or None if a CPU has to handle the file.

    Args:
        content: Bytes of a file.
        transform: Eval transform.
        max_pixels: Size limit, in pixels, of a decoded and of a resized image.
    """
    # A GPU's decoder silently fills in the missing part of a truncated file.
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
