"""Size of a WebP, read without a decoder (https://developers.google.com/speed/webp/docs/riff_container)."""

HEADER_BYTES = 30


def read_webp_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of a WebP's canvas in pixels, or None for other files and damaged headers.

    Args:
        content: Bytes of a file.
    """
    if len(content) < HEADER_BYTES or content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return None
    match content[12:16]:
        case b"VP8X":  # 24 bits each, minus one
            return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
        case b"VP8L":  # 14 bits each, minus one
            bits = int.from_bytes(content[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":  # 14 bits each, plus 2 bits of scaling
            width, height = (int.from_bytes(content[start : start + 2], "little") for start in (26, 28))
            return width & 0x3FFF, height & 0x3FFF
        case _:
            return None
