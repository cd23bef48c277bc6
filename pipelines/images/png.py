"""PNG files reduced to the chunks that their pixels need (PNG specification, https://www.w3.org/TR/png-3/#5Chunk-layout)."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Length, type and CRC of a chunk.
CHUNK_OVERHEAD = 12
ANCILLARY_BIT = 0x20


def drop_ancillary_chunks(content: bytes) -> bytes | None:
    """Return a PNG without text, colour profile and every other chunk that a decoder may skip.

    Decoders have to show a PNG whatever its ancillary chunks hold. Pillow instead refuses files whose text or profile
    is large, or whose CRC is wrong.

    Args:
        content: The bytes of a file.

    Returns:
        None if the file is no PNG. What follows a damaged length or the last chunk is kept as it is.
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
