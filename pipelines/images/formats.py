"""Identification of image formats by the first bytes of a file.

Used for files that no decoder accepts. An error that names `HEIC` or `PDF` tells users what to convert or install, and
distinguishes such files from error pages and other files that are not images.
"""

import re

# Shorter files cannot hold the header of any format.
MIN_BYTES = 12
# Length of the comments and declarations before the first element of an SVG.
MAX_SVG_PROLOGUE = 4096
MAX_BRANDS_BYTES = 256

HEIF_NAMES = frozenset({"HEIC", "HEIF"})
"""Formats that the extra `heif` decodes."""

# Offset, bytes and name, more specific signatures first.
SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc", "JPEG XR"),
    (8, b"CR\x02", "camera raw (Canon CR2)"),
    (6, b"HEAPCCDR", "camera raw (Canon CRW)"),
    (0, b"FUJIFILMCCD-RAW", "camera raw (Fujifilm RAF)"),
    (0, b"IIRO", "camera raw (Olympus ORF)"),
    (0, b"IIRS", "camera raw (Olympus ORF)"),
    (0, b"MMOR", "camera raw (Olympus ORF)"),
    (0, b"IIU\x00", "camera raw (Panasonic RW2)"),
    (0, b"FOVb", "camera raw (Sigma X3F)"),
    (0, b"\x00MRM", "camera raw (Minolta MRW)"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"II+\x00", "TIFF"),
    (0, b"MM\x00+", "TIFF"),
    (0, b"8BPS\x00\x02", "Photoshop large document (PSB)"),
    (0, b"8BPS", "Photoshop document (PSD)"),
    (0, b"%PDF-", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (128, b"DICM", "DICOM"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"gimp xcf", "GIMP (XCF)"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"\xabKTX ", "KTX"),
    (0, b"\x13\xab\xa1\x5c", "ASTC"),
    (40, b" EMF", "Windows metafile (EMF)"),
    (0, b"\xd7\xcd\xc6\x9a", "Windows metafile (WMF)"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM video"),
)
# Brands of the ISO base media file format (ISO/IEC 14496-12) in HEIF (23008-12), AVIF and camera files.
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    b"crx ": "camera raw (Canon CR3)",
    **dict.fromkeys((b"mif1", b"mif2", b"msf1", b"avci", b"avcs", b"jpeg", b"j2ki", b"vvic"), "HEIF"),
    **dict.fromkeys((b"qt  ", b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"M4V "), "MP4 or QuickTime video"),
}
SVG = re.compile(rb"\s*(<\?xml|<!--|<!doctype\s+svg|<svg)")


def name_format(content: bytes) -> str | None:
    """Return the name of a file's format, or None if it is not an image of a known format.

    Args:
        content: Bytes of the file.
    """
    if len(content) < MIN_BYTES:
        return None
    if content[4:8] == b"ftyp":
        return _name_by_brands(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    for offset, signature, name in SIGNATURES:
        if content.startswith(signature, offset):
            return name
    return "SVG" if _is_svg(content) else None


def _name_by_brands(content: bytes) -> str | None:
    """Return the format of the major brand or, if that is generic, of the first specific compatible brand."""
    num_bytes = min(int.from_bytes(content[:4], "big"), MAX_BRANDS_BYTES)
    brands = [content[8:12], *(content[start : start + 4] for start in range(16, num_bytes - 3, 4))]
    names = [BRANDS[brand] for brand in brands if brand in BRANDS]
    specific = [name for name in names if name != "HEIF"]
    if names and names[0] == "HEIF" and specific:
        return specific[0]
    return names[0] if names else None


def _is_svg(content: bytes) -> bool:
    head = content[:MAX_SVG_PROLOGUE].removeprefix(b"\xef\xbb\xbf").lower()
    return SVG.match(head) is not None and b"<svg" in head and b"<html" not in head
