"""Decoding of every format, of damaged files and of files that take too long."""

import io
import os
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluster.local.photographs import encode, photographs
from pipelines.errors import ItemError
from pipelines.images import decode
from pipelines.images.decode import decode_by_pillow, decode_rgb, is_clipped_grey
from pipelines.images.jpeg import MAX_SCANS, size_for_device
from pipelines.images.preprocess import Mode, make_preprocess
from pipelines.images.transform import EvalTransform
from tests.support.broken import png_chunk, with_scans

MAX_PIXELS = 10**6


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"")), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


JPEG = encode(photographs()["coffee"])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"plain text", "not_an_image"),
        (b"<html><body>404</body></html>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "unsupported"),
        (JPEG[:5], "not_an_image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (png_header(30_000, 30_000), "too_many_pixels"),
        (png_header(1001, 1000), "too_many_pixels"),
    ],
)
def test_undecodable_files_raise_their_error_kind(content: bytes, kind: str) -> None:
    with pytest.raises(ItemError) as caught:
        decode_rgb(content, MAX_PIXELS)
    assert caught.value.kind == kind
    assert caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_equal_pillows_bit_for_bit(mode: str, subsampling: str, progressive: bool) -> None:
    for number, source in enumerate(list(photographs().values())[:6]):
        image = source.resize((90 + number, 61 + 3 * number)).convert(mode)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(30, 75, 95)[number % 3], subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode_rgb(file.getvalue(), MAX_PIXELS)), expected)


def test_damaged_jpegs_equal_pillows_bit_for_bit() -> None:
    chance, sources = np.random.default_rng(1), list(photographs().values())
    ends: Counter[str] = Counter()
    for number in range(400):
        file = io.BytesIO()
        source = sources[number % len(sources)].resize((120 + number % 17, 90))
        source.save(file, "JPEG", subsampling=number % 3, progressive=bool(number % 2))
        content = damage(file.getvalue(), number % 4, chance)
        ours, theirs = (outcome(decode, content) for decode in (decode_rgb, decode_by_pillow))
        np.testing.assert_array_equal(ours, theirs)
        ends[theirs if isinstance(theirs, str) else "decoded"] += 1
    assert min(ends["decoded"], ends["truncated"], ends["corrupt"]) > 20


def damage(content: bytes, way: int, chance: np.random.Generator) -> bytes:
    """Change a byte anywhere or near the start, drop some bytes, or truncate the file."""
    start = int(chance.integers(2, (len(content) - 20, 700)[way == 1]))
    if way < 2:
        return content[:start] + chance.bytes(1) + content[start + 1 :]
    return content[:start] + (content[start + int(chance.integers(1, 20)) :] if way == 2 else b"")


def outcome(decode: Callable[[bytes, int], Image.Image], content: bytes) -> NDArray[np.uint8] | str:
    """Return the pixels, or the kind of the error."""
    try:
        return np.asarray(decode(content, MAX_PIXELS))
    except ItemError as error:
        return error.kind


def test_first_frame_is_decoded() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(buffer.getvalue(), MAX_PIXELS).getpixel((4, 4)) == (255, 0, 0)


PNG_HEADER_END = 33  # signature and IHDR
LARGE_TEXT = b"workflow\0\1\0\0\0" + zlib.compress(os.urandom(1000) * 4000)


@pytest.mark.parametrize(
    "extra",
    [
        png_chunk(b"iTXt", LARGE_TEXT),
        png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(5_000_000))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(5_000_000))),
        b"".join(png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(1_000_000))) for _ in range(80)),
        png_chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",
        png_chunk(b"gAMA", b"\0\0\1\2")[:-4] + b"\0\0\0\0",
        png_chunk(b"zTXt", b"comment\0\7damaged"),
        png_chunk(b"pHYs", b"\0"),
    ],
    ids=["text", "ztext", "profile", "many texts", "text crc", "gamma crc", "text method", "short"],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_ancillary_chunks_of_a_png_do_not_change_the_pixels(extra: bytes, mode: str) -> None:
    source = photographs()["coffee"].resize((40, 30))
    image = source.convert("L").convert(mode) if mode in ("1", "I;16") else source.convert(mode)
    content = encode(image, "PNG", **({"transparency": 3} if mode == "P" else {}))
    expected = np.asarray(decode_rgb(content, MAX_PIXELS))
    found = decode_rgb(content[:PNG_HEADER_END] + extra + content[PNG_HEADER_END:], MAX_PIXELS)
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert is_clipped_grey(found) == (mode == "I;16")


def test_damaged_critical_chunk_of_a_png_is_corrupt() -> None:
    content = bytearray(encode(photographs()["coffee"], "PNG"))
    content[PNG_HEADER_END - 1] ^= 1  # the CRC of IHDR
    assert reason(bytes(content)) == ("corrupt", "PNG: broken PNG file (bad header checksum in b'IHDR')")


def tiff_with(tag: int, value: int) -> bytes:
    """Return an RGB TIFF with another value of one tag."""
    content = bytearray(encode(photographs()["coffee"].resize((20, 15)), "TIFF"))
    start = int.from_bytes(content[4:8], "little") + 2
    (entry,) = (at for at in range(start, start + 240, 12) if struct.unpack_from("<H", content, at)[0] == tag)
    struct.pack_into("<H", content, entry + 8, value)
    return bytes(content)


NOISE = np.random.default_rng(0).bytes(3000)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + NOISE, "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1jpeg" + NOISE, "HEIF"),
        (b"\xff\x0a" + NOISE, "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + NOISE, "JPEG XL"),
        (b"FUJIFILMCCD-RAW 0201" + NOISE, "camera raw"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + NOISE, "camera raw"),
        (b"%PDF-1.7\n" + NOISE, "PDF"),
        (b"8BPS\0\2" + NOISE, "PSB"),
        (b"v/1\1" + NOISE, "OpenEXR"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (tiff_with(277, 5), "TIFF"),  # samples per pixel
        (tiff_with(259, 34887), "TIFF"),  # compression: LERC
        (tiff_with(262, 32803), "TIFF"),  # colour filter array
    ],
)
def test_known_format_without_decoder_is_named(content: bytes, name: str) -> None:
    kind, message = reason(content)
    assert kind == "unsupported"
    assert name in message.partition(":")[0]


def reason(content: bytes) -> tuple[str, str]:
    with pytest.raises(ItemError) as caught:
        decode_rgb(content, MAX_PIXELS)
    return caught.value.kind, caught.value.message


@pytest.fixture
def heic() -> bytes:
    source = photographs()["coffee"].resize((160, 120))
    file = io.BytesIO()
    pillow_heif.from_pillow(source).save(file, quality=90)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_heic_is_decoded_with_the_extra(heic: bytes, mode: Mode) -> None:
    source = np.asarray(photographs()["coffee"].resize((160, 120)), np.float64)
    assert np.abs(np.asarray(decode_rgb(heic, MAX_PIXELS)) - source).mean() < 4
    done = make_preprocess(mode, IMAGENET, MAX_PIXELS)(heic)
    assert (done.width, done.height) == (160, 120)
    with pytest.raises(ItemError, match="160 x 120 pixels, more than"):
        decode_rgb(heic, 160 * 120 - 1)


def test_heic_without_the_extra_names_the_extra(heic: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    for cached in (decode._register_heif, decode._safe_formats):
        cached.cache_clear()
    try:
        kind, message = reason(heic)
    finally:
        for cached in (decode._register_heif, decode._safe_formats):
            cached.cache_clear()
    assert kind == "unsupported"
    assert "HEIC" in message
    assert "ecaray[heif]" in message


@pytest.mark.parametrize(("suffix", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I"), ("TIFF", "F")])
def test_deep_grey_is_marked_as_clipped(suffix: str, mode: str) -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    image = Image.fromarray(ramp.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    content = encode(image, suffix)
    for exact_or_fast in ("exact", "fast"):
        assert make_preprocess(exact_or_fast, IMAGENET, MAX_PIXELS)(content).is_clipped
    found = decode_rgb(content, MAX_PIXELS)
    assert is_clipped_grey(found)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1"])
def test_8_bit_images_are_not_marked_as_clipped(mode: str) -> None:
    content = encode(photographs()["coffee"].resize((20, 20)).convert(mode), "PNG")
    assert not is_clipped_grey(decode_rgb(content, MAX_PIXELS))
    assert not make_preprocess("fast", IMAGENET, MAX_PIXELS)(content).is_clipped


IMAGENET = EvalTransform((224, 224), 0.875, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(params=["RGB", "L", "CMYK"])
def many_scans(request: pytest.FixtureRequest) -> bytes:
    """JPEG of 16 megapixels in less than 200 KB, whose scans take minutes to decode."""
    file = io.BytesIO()
    Image.new(request.param, (4000, 4000)).save(file, "JPEG", progressive=True, quality=50)
    return with_scans(file.getvalue(), 2000)


def test_jpeg_of_many_scans_is_rejected_immediately_in_every_mode(many_scans: bytes) -> None:
    started = time.monotonic()
    decoders: list[Callable[[bytes], object]] = [make_preprocess(mode, IMAGENET, 10**8) for mode in MODES]
    decoders += [lambda content: decode_rgb(content, 10**8), lambda content: decode_by_pillow(content, 10**8)]
    for decoder in decoders:
        with pytest.raises(ItemError, match="scans") as caught:
            decoder(many_scans)
        assert caught.value.kind == "too_slow"
    assert size_for_device(many_scans, IMAGENET, 10**8) is None
    assert time.monotonic() - started < 2


MODES: tuple[Mode, ...] = ("exact", "fast", "cuda")


def test_scans_within_the_limit_and_in_further_images_are_accepted() -> None:
    progressive = encode(photographs()["coffee"].resize((64, 48)), progressive=True)
    num_scans = progressive.count(b"\xff\xda")
    thumbnails = b"\xff\xee" + struct.pack(">H", 2 + 5 * 400) + b"\xff\xda\0\2\0" * 400
    for content in (
        with_scans(progressive, MAX_SCANS - num_scans),
        progressive + progressive * 30,  # panoramas and motion photographs append further images
        progressive[:2] + thumbnails + progressive[2:],
    ):
        assert decode_rgb(content, MAX_PIXELS).size == (64, 48)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode_by_pillow(content, MAX_PIXELS)), expected)
    with pytest.raises(ItemError, match="scans"):
        decode_rgb(with_scans(progressive, MAX_SCANS - num_scans + 1), MAX_PIXELS)


@pytest.fixture
def short_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_DECODE_S", 0.2)


@pytest.mark.usefixtures("short_of_time")
def test_decoding_stops_at_the_time_limit() -> None:
    png = encode(Image.new("RGB", (8, 8)), "PNG")
    slow = {
        "chunks": png[:PNG_HEADER_END] + png_chunk(b"tEXt", b"a\0b") * 200_000 + png[PNG_HEADER_END:],
        "digits": b"P3 700 700 255 " + b"1 2 3 " * 490_000,
        "runs": b"qoif" + struct.pack(">IIBB", 900, 900, 3, 0) + b"\xfe\1\2\3" * 810_000,
    }
    for content in slow.values():
        started = time.thread_time()
        assert reason(content)[0] == "too_slow"
        assert time.thread_time() - started < 1.5
    assert decode_rgb(png, MAX_PIXELS).size == (8, 8)


def test_only_the_first_of_many_frames_is_decoded() -> None:
    frames = [Image.new("RGB", (90, 90), (number % 256, number // 256, 0)) for number in range(1, 400)]
    for suffix in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encode(frames[0], suffix, save_all=True, append_images=frames[1:])
        started = time.thread_time()
        assert decode_rgb(content, MAX_PIXELS).getpixel((4, 4)) == pytest.approx((1, 0, 0), abs=2)
        assert time.thread_time() - started < 0.2
