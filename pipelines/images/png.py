"""Reduction of PNG files to their critical chunks (PNG specification, https://www.w3.org/TR/png-3/#5Chunk-layout)."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bytes of the length, type and CRC of a chunk.
CHUNK_OVERHEAD = 12
ANCILLARY_BIT = 0x20


def drop_ancillary_chunks(content: bytes) -> bytes | None:
    """Return a PNG without its ancillary chunks, such as text and colour profile.

    The specification requires decoders to display a PNG whatever its ancillary chunks hold. Pillow instead rejects
    files whose text or profile is large, or whose ancillary CRC is wrong.

    Args:
        content: Bytes of a file.

    Returns:
        The reduced file, or None if the file is not a PNG. Bytes after a damaged length or the last chunk are kept.
    """
    if not content.startswith(SIGNATURE):
        return None
    view = memoryview(content)
    kept = [view[: len(SIGNATURE)]]
    position = len(SIGNATURE)
    while position + CHUNK_OVERHEAD <= len(content):
        end = position + CHUNK_OVERHEAD + int.from_bytes(view[position : position + 4], "big")
        is_ancillary = view[position + 4] & ANCILLARY_BIT
        if not is_ancillary:
            kept.append(view[position:end])
        position = end
    return b"".join([*kept, view[position:]])
