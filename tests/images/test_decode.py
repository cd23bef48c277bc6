import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluster.photographs import encode, photographs
from pipelines.errors import ItemError
from pipelines.images.decode import decode_by_pillow, decode_rgb

MAX_PIXELS = 10**6


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = encode(photographs()["coffee"])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"plain text", "not_an_image"),
        (b"<html><body>404</body></html>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not_an_image"),
        (JPEG[:5], "not_an_image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (png_header(30_000, 30_000), "too_many_pixels"),
        (png_header(1001, 1000), "too_many_pixels"),
    ],
)
def test_what_is_no_image_says_why(content: bytes, kind: str) -> None:
    with pytest.raises(ItemError) as caught:
        decode_rgb(content, MAX_PIXELS)
    assert caught.value.kind == kind
    assert caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_to_the_bit_what_pillow_makes_of_them(mode: str, subsampling: str, progressive: bool) -> None:
    for number, source in enumerate(list(photographs().values())[:6]):
        image = source.resize((90 + number, 61 + 3 * number)).convert(mode)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(30, 75, 95)[number % 3], subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode_rgb(file.getvalue(), MAX_PIXELS)), expected)


def test_damaged_jpegs_are_to_the_bit_what_pillow_makes_of_them() -> None:
    chance, sources = np.random.default_rng(1), list(photographs().values())
    ends: Counter[str] = Counter()
    for number in range(400):
        file = io.BytesIO()
        source = sources[number % len(sources)].resize((120 + number % 17, 90))
        source.save(file, "JPEG", subsampling=number % 3, progressive=bool(number % 2))
        content = damaged(file.getvalue(), number % 4, chance)
        ours, theirs = (outcome(decode, content) for decode in (decode_rgb, decode_by_pillow))
        np.testing.assert_array_equal(ours, theirs)
        ends[theirs if isinstance(theirs, str) else "decoded"] += 1
    assert min(ends["decoded"], ends["truncated"], ends["corrupt"]) > 20


def damaged(content: bytes, way: int, chance: np.random.Generator) -> bytes:
    """A byte changed anywhere or near the start, some bytes left out, or all from one on."""
    start = int(chance.integers(2, (len(content) - 20, 700)[way == 1]))
    if way < 2:
        return content[:start] + chance.bytes(1) + content[start + 1 :]
    return content[:start] + (content[start + int(chance.integers(1, 20)) :] if way == 2 else b"")


def outcome(decode: Callable[[bytes, int], Image.Image], content: bytes) -> NDArray[np.uint8] | str:
    """Its pixels, or the kind of its error."""
    try:
        return np.asarray(decode(content, MAX_PIXELS))
    except ItemError as error:
        return error.kind


def test_the_first_frame_counts() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(buffer.getvalue(), MAX_PIXELS).getpixel((4, 4)) == (255, 0, 0)
