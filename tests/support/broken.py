"""Files as in real collections: broken, misnamed, malicious, or unusual but valid."""

import functools
import io
import re
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from cluster.local.photographs import encode, photographs
from tests.support.photographs import as_mode

TENTHS = range(1, 10)


@functools.cache
def broken_files() -> dict[str, tuple[bytes, set[str]]]:
    """Return the bytes of broken files and their acceptable error kinds, by file name."""
    image = photographs()["coffee"].resize((200, 150))
    jpeg, png, webp = encode(image), encode(image, "PNG"), encode(image, "WEBP")
    gif, tiff = encode(image.convert("P"), "GIF"), encode(image, "TIFF", compression="tiff_lzw")
    cut = {"truncated", "corrupt", "not_an_image"}
    files: dict[str, tuple[bytes, set[str]]] = {}
    for name, content in (("jpg", jpeg), ("png", png), ("webp", webp), ("gif", gif), ("tiff", tiff)):
        for tenth in TENTHS:
            files[f"cut-{tenth}.{name}"] = (content[: len(content) * tenth // 10], cut)
    files |= {
        "empty.jpg": (b"", {"empty"}),
        "text.jpg": (b"This is no image.\n" * 50, {"not_an_image"}),
        "page.jpg": (b"<!doctype html><html><body>404 Not Found</body></html>", {"not_an_image"}),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", {"unsupported"}),
        "print.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run showpage\n", {"unsupported"}),
        "zeros.jpg": (bytes(5000), {"not_an_image"}),
        "noise.jpg": (np.random.default_rng(3).bytes(5000), {"not_an_image"}),
        "answer.json": (b'{"Code": "AccessDenied"}', {"not_an_image"}),
        "huge.png": (_png(30_000, 30_000, b""), {"too_many_pixels"}),
        "huge.jpg": (_with_jpeg_size(jpeg, 65_000, 65_000), {"too_many_pixels"}),
        "bomb.png": (_png(40_000, 40_000, b"\0" * 50_000_000), {"too_many_pixels"}),
        "nothing-in-it.png": (_png(300, 300, b""), cut),
        "no-size.jpg": (_with_jpeg_size(jpeg, 0, 0), cut | {"unsupported"}),
        "scans.jpg": (with_scans(encode(image, progressive=True), 1000), {"too_slow"}),
        "phone.heic": (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + np.random.default_rng(4).bytes(2000), {"unsupported"}),
        "picture.jxl": (b"\xff\x0a" + np.random.default_rng(5).bytes(1000), {"unsupported"}),
        "paper.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", {"unsupported"}),
        "loop.tiff": (b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0", cut),
    }
    return files


@functools.cache
def strange_files() -> dict[str, bytes]:
    """Return the bytes of files that look wrong but are valid, by file name."""
    image = photographs()["coffee"].resize((200, 150))
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = io.BytesIO()
    image.save(animated, "GIF", save_all=True, append_images=[image.rotate(90)] * 3)
    return {
        "png-in-truth.jpg": encode(image, "PNG"),
        "no-suffix": encode(image),
        "animated.gif": animated.getvalue(),
        "cmyk.jpg": encode(image.convert("CMYK")),
        "sixteen.png": encode(as_mode(image, "I;16"), "PNG"),
        "one.png": encode(image.resize((1, 1)), "PNG"),
        "line.png": encode(image.resize((3000, 1)), "PNG"),
        "turned.jpg": encode(image, exif=exif.tobytes()),
        "odd-exif.jpg": encode(image, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage"),
        "progressive.jpg": encode(image, progressive=True),
        "arithmetic.jpg": encode(image).replace(
            b"\xff\xc0", b"\xff\xc9", 1
        ),  # declares arithmetic coding, and is decoded that way
        "grey.jpg": encode(image.convert("L")),
        "more-behind.jpg": encode(image) + b"trailing" * 100,
        "with space #1 100% \u00fc \U0001f408.jpg": encode(image),
        "new\nline.jpg": encode(image),
        "text-bomb.png": _text_bomb(encode(image, "PNG")),
        "..dots...jpg": encode(image),
        "k" * 200 + ".jpg": encode(image),
    }


def with_scans(jpeg: bytes, num_scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated `num_scans` times."""
    scans = [found.start() for found in re.finditer(b"\xff\xda", jpeg)]
    assert len(scans) > 1, "not progressive"
    return jpeg[:-2] + jpeg[scans[-1] : -2] * num_scans + jpeg[-2:]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def _text_bomb(png: bytes) -> bytes:
    """Return a PNG with a compressed comment of 100 MB before the pixels."""
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    return png[:33] + comment + png[33:]


def _with_jpeg_size(jpeg: bytes, width: int, height: int) -> bytes:
    start: Any = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]
