import io
import struct
import zlib

import pytest
from PIL import Image

from cluster.photographs import encode, photographs
from pipelines.errors import ItemError
from pipelines.images.decode import decode_rgb

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


def test_the_first_frame_counts() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(buffer.getvalue(), MAX_PIXELS).getpixel((4, 4)) == (255, 0, 0)
