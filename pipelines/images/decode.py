"""Decoding of encoded bytes to RGB, as in timm's datasets: first frame, `convert("RGB")`, no EXIF rotation."""

import contextlib
import functools
import io
import struct
import time
import warnings
from collections.abc import Iterator

import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from pipelines.errors import ErrorKind, ItemError, RunError
from pipelines.images.formats import HEIF_NAMES, name_format
from pipelines.images.jpeg import read_size, refuse_many_scans
from pipelines.images.memory import BYTES_PER_PIXEL, JPEG_BYTES_PER_PIXEL, OTHER_BYTES_PER_PIXEL, Reservation
from pipelines.images.png import drop_ancillary_chunks
from pipelines.images.webp import read_webp_size

# Pillow runs PostScript in Ghostscript, an interpreter that untrusted files must not reach.
UNSAFE_FORMATS = frozenset({"EPS"})
# Formats whose pixels are, or may be, a JPEG.
JPEG_FORMATS = frozenset({"JPEG", "MPO", "BLP"})
# Greyscale modes of more than 8 bits, which `convert("RGB")` clips to 0..255.
DEEP_GREY_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
# Key of `Image.info` that marks images whose grey was clipped.
CLIPPED_GREY = "clipped_grey"
MAX_DECODE_S = 60.0
"""CPU time, in seconds, after which Pillow gets no more bytes of a file. It stops files of millions of tiny blocks (a
PNG of 256 MB may hold 20 million chunks, at 4 us each) and large files in formats that Pillow decodes in Python (plain
PPM, QOI)."""

# If true, Pillow and simplejpeg return the same pixels, bit for bit.
IS_PILLOWS_JPEG_TURBO = features.check_feature("libjpeg_turbo")

# Substrings of Pillow's error messages for variants that it cannot read.
UNSUPPORTED_WORDS = (
    "unsupported",
    "not supported",
    "not implemented",
    "unimplemented",
    "cannot find loader",
    "cannot handle",
    "not available",
    "could not be identified because",  # Pillow was built without the format's library
    "unknown pixel",
    "unknown data organization",
    "unknown compression",
    "not a psd file",  # a PSD of another version
)


@contextlib.contextmanager
def decoded(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Decode one image as `decode_rgb` does, and reserve its memory until the end of the `with` block."""
    with Reservation() as memory:
        yield _decode_jpeg(content, max_pixels, memory) or decode_by_pillow(content, max_pixels, memory)


def decode_rgb(content: bytes, max_pixels: int) -> Image.Image:
    """Decode one image to mode RGB, at its full size.

    JPEGs are decoded by a direct call of the library that Pillow uses, which takes a fifth less time. Pillow decodes
    everything else.

    Args:
        content: Bytes of a file.
        max_pixels: Size limit of the image: width times height.

    Raises:
        ItemError: `not_an_image`, `too_many_pixels`, `too_slow`, `truncated`, `corrupt` or `unsupported`.
    """
    with decoded(content, max_pixels) as image:
        return image


def is_clipped_grey(image: Image.Image) -> bool:
    """Return whether an image was greyscale of more than 8 bits, most of which `convert("RGB")` clips to white."""
    return CLIPPED_GREY in image.info


def _decode_jpeg(content: bytes, max_pixels: int, memory: Reservation) -> Image.Image | None:
    """Decode a JPEG without Pillow. Return None if Pillow has to decode the file or to find its error."""
    if not IS_PILLOWS_JPEG_TURBO:
        return None
    try:
        width, height = read_size(content, max_pixels)
        memory.acquire(width * height * JPEG_BYTES_PER_PIXEL)
        return Image.fromarray(simplejpeg.decode_jpeg(content))
    except ValueError:
        return None


def decode_by_pillow(content: bytes, max_pixels: int, memory: Reservation | None = None) -> Image.Image:
    """Decode a file of any format with Pillow, to mode RGB.

    Args:
        content: Bytes of a file.
        max_pixels: Size limit of the image: width times height.
        memory: Reservation for the memory that the decoder needs; None reserves nothing.

    Raises:
        ItemError: As in `decode_rgb`.
        RunError: As in `Reservation.acquire`.
    """
    with warnings.catch_warnings(), _pillow_limit(max_pixels):
        # Pillow warns about odd EXIF, palettes with transparency, and sizes that `max_pixels` already checks.
        warnings.simplefilter("ignore")
        try:
            return _load(content, max_pixels, memory)
        except (ItemError, RunError):
            raise
        except Exception as error:
            without_extras = drop_ancillary_chunks(content)
            if without_extras is None or isinstance(error, Image.DecompressionBombError):
                raise _item_error(error, content) from None
        try:
            return _load(without_extras, max_pixels, memory)
        except (ItemError, RunError):
            raise
        except Exception as error:
            raise _item_error(error, without_extras) from None


def _load(content: bytes, max_pixels: int, memory: Reservation | None) -> Image.Image:
    webp_size = read_webp_size(content)
    if webp_size:  # Pillow allocates the canvas when it opens the file
        _check_size("WEBP", webp_size, max_pixels, memory)
    image = Image.open(_TimedFile(content), formats=_formats_for(content))
    if image.format in JPEG_FORMATS:
        refuse_many_scans(content)
    if webp_size is None:
        _check_size(image.format, image.size, max_pixels, memory)
    converted = image.convert("RGB")
    if image.mode in DEEP_GREY_MODES:
        converted.info[CLIPPED_GREY] = True
    return converted


def _check_size(format_name: str | None, size: tuple[int, int], max_pixels: int, memory: Reservation | None) -> None:
    """Reserve memory for an image.

    Raises:
        ItemError: `too_many_pixels`.
    """
    width, height = size
    if width * height > max_pixels:
        raise ItemError("too_many_pixels", f"{width} x {height} pixels, more than preprocess.max_pixels = {max_pixels}")
    if memory:
        memory.acquire(width * height * BYTES_PER_PIXEL.get(format_name or "", OTHER_BYTES_PER_PIXEL))


class _TimedFile(io.BytesIO):
    """In-memory file that stops decoders that take too long.

    Most of Pillow's decoders read block by block. The time of those that read the whole file at once is proportional
    to the number of pixels.

    Args:
        content: Bytes of the file.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._stop_at = time.thread_time() + MAX_DECODE_S

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().readline(size)

    def _check(self) -> None:
        if time.thread_time() > self._stop_at:
            raise ItemError("too_slow", f"decoding took more than {MAX_DECODE_S:g} s of CPU time")


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Make Pillow reject more than twice `max_pixels`, wherever in a file it finds such a size."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _formats_for(content: bytes) -> tuple[str, ...]:
    if name_format(content) in HEIF_NAMES and _register_heif():
        return ("HEIF",)
    return _safe_formats()


@functools.cache
def _safe_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in UNSAFE_FORMATS)


@functools.cache
def _register_heif() -> bool:
    """Register HEIC and HEIF with Pillow. Return False if the extra `heif` is not installed."""
    try:
        import pillow_heif  # late: takes 26 MB, and few data sets need it
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return True


def _item_error(error: Exception, content: bytes) -> ItemError:
    """Convert an error of Pillow to an `ItemError`."""
    if isinstance(error, Image.DecompressionBombError):
        return ItemError("too_many_pixels", str(error))
    if isinstance(error, UnidentifiedImageError):
        return _why_unidentified(content)
    # Decoders raise many types of errors on damaged bytes (struct.error, SyntaxError, KeyError, ...).
    return _error_of(_kind_of(error), f"{type(error).__name__}: {error}")


def _why_unidentified(content: bytes) -> ItemError:
    """Return why none of Pillow's plugins opens a file. Ask the plugin of its format, if there is one."""
    name = name_format(content)
    if name is None:
        return ItemError("not_an_image", "the bytes match no known image format")
    if name in HEIF_NAMES and not _register_heif():
        return ItemError("unsupported", f"{name}: install ecaray[heif] on every node to decode it")
    for format_name in _formats_for(content):
        opens, accepts = Image.OPEN[format_name]
        verdict = accepts(content[:16]) if accepts else False
        if isinstance(verdict, str):
            return ItemError("unsupported", f"{name}: {verdict}")
        if verdict:
            try:
                opens(_TimedFile(content), "")
            except Exception as error:
                # libheif reports unsupported variants as damaged files.
                kind = "unsupported" if name in HEIF_NAMES else _kind_of(error)
                return _error_of(kind, f"{name}: {error}")
    return ItemError("unsupported", f"{name}: no decoder for this format; convert such files to JPEG or PNG first")


def _error_of(kind: ErrorKind, message: str) -> ItemError:
    return ItemError(kind, " ".join(message.split())[:500])


def _kind_of(error: Exception) -> ErrorKind:
    lowered = str(error).lower()
    if any(word in lowered for word in UNSUPPORTED_WORDS) or isinstance(error.__cause__, KeyError):
        return "unsupported"  # a KeyError means that one of Pillow's tables lacks the variant
    if "truncated" in lowered or "unexpected end" in lowered or "not enough" in lowered:
        return "truncated"
    if isinstance(error.__cause__, struct.error | IndexError | EOFError):
        return "truncated"  # the header ends too early
    return "corrupt"
