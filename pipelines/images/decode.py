"""Encoded bytes to RGB pixels, as timm's datasets have Pillow do: the first frame, `convert("RGB")`, no EXIF turn."""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator

import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from pipelines.errors import ErrorKind, ItemError
from pipelines.images.jpeg import read_size

# Pillow hands PostScript to Ghostscript, an interpreter that strangers' files have no business with.
UNSAFE_FORMATS = frozenset({"EPS"})


# Its results are the same to the bit, whoever calls it.
IS_PILLOWS_JPEG_TURBO = features.check_feature("libjpeg_turbo")


def decode_rgb(content: bytes, max_pixels: int) -> Image.Image:
    """Decode one image to mode RGB, at its full size.

    JPEGs are decoded by the library that Pillow has do it, but called directly, which takes a fifth less time.

    Args:
        content: the bytes of a file.
        max_pixels: largest width times height.

    Raises:
        ItemError: `not_an_image`, `too_many_pixels`, `truncated`, `corrupt` or `unsupported`.
    """
    if IS_PILLOWS_JPEG_TURBO:
        try:
            read_size(content, max_pixels)
            return Image.fromarray(simplejpeg.decode_jpeg(content))
        except ValueError:
            pass  # Pillow reads some of what is refused here, and says of the others what is wrong with them
    return decode_by_pillow(content, max_pixels)


def decode_by_pillow(content: bytes, max_pixels: int) -> Image.Image:
    """As `decode_rgb`, whatever the format.

    Args:
        content: the bytes of a file.
        max_pixels: largest width times height.

    Raises:
        ItemError: as `decode_rgb`.
    """
    with warnings.catch_warnings(), _pillow_limit(max_pixels):
        # Pillow warns of odd EXIF, of palettes with transparency, and of sizes that `max_pixels` judges already.
        warnings.simplefilter("ignore")
        try:
            image = _open(content, max_pixels)
            return image.convert("RGB")
        except ItemError:
            raise
        except UnidentifiedImageError:
            raise ItemError("not_an_image", "no decoder knows these bytes") from None
        except Image.DecompressionBombError as error:
            raise ItemError("too_many_pixels", str(error)) from None
        except Exception as error:
            # Decoders fail on damaged bytes in every way there is (struct.error, SyntaxError, KeyError, ...).
            message = " ".join(str(error).split()) or "no reason given"
            raise ItemError(_kind_of(message), f"{type(error).__name__}: {message}"[:500]) from None


def _open(content: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=_safe_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise ItemError("too_many_pixels", f"{width} x {height} pixels, more than preprocess.max_pixels = {max_pixels}")
    return image


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Have Pillow itself refuse twice that size, in whatever part of a file it meets it."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@functools.cache
def _safe_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in UNSAFE_FORMATS)


def _kind_of(message: str) -> ErrorKind:
    lowered = message.lower()
    if "truncated" in lowered or "unexpected end" in lowered or "not enough" in lowered:
        return "truncated"
    if any(word in lowered for word in ("unsupported", "not supported", "cannot find loader", "not available")):
        return "unsupported"
    return "corrupt"
