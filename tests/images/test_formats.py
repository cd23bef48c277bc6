"""Identification of image formats by their first bytes."""

import pytest

from pipelines.images.formats import name_format

FILLER = bytes(200)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0mif1", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw (Canon CR3)"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "MP4 or QuickTime video"),
        (b"\xff\x0a\x00\x90", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"II*\0\x10\0\0\0CR\x02\0", "camera raw (Canon CR2)"),
        (b"FUJIFILMCCD-RAW 0201", "camera raw (Fujifilm RAF)"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"MM\0+\0\x08\0\0", "TIFF"),
        (b"8BPS\0\x01", "Photoshop document (PSD)"),
        (b"8BPS\0\x02", "Photoshop large document (PSB)"),
        (b"%PDF-1.4\n", "PDF"),
        (b"v/1\x01\x02\0\0\0", "OpenEXR"),
        (b"\0" * 128 + b"DICM", "DICOM"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn -->\n<SVG width='1'>", "SVG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", None),
        (b"<!doctype html><html><body><svg></svg></body></html>", None),
        (b"<!-- page --><html><svg></svg></html>", None),
        (b'{"Code": "AccessDenied"}', None),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"\0\0\0\x18ftyp????", None),
    ],
)
def test_first_bytes_name_the_format(head: bytes, name: str | None) -> None:
    assert name_format(head + FILLER) == name


def test_file_too_short_for_a_header_has_no_format() -> None:
    assert name_format(b"\xff\xd8\xff\xe0") is None
    assert name_format(b"") is None
