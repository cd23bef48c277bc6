"""The tables that pass between the stages, and those that are written. Plain Arrow types only."""

import pyarrow as pa

ERROR_FIELDS = [pa.field("error_kind", pa.string()), pa.field("error_message", pa.string())]
"""Null in good rows."""

RETRIES_FIELD = pa.field("num_retries", pa.int32())
"""Attempts at fetching an image before the last one."""

CLIPPED_FIELD = pa.field("is_clipped", pa.bool_())
"""True for grey images of more than 8 bits, most of which timm's transform turns white. Null if it failed."""

SOURCE_FIELDS = [
    pa.field("id", pa.int64()),
    pa.field("uri", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]

PIXEL_FIELDS = [pa.field("image", pa.large_binary()), pa.field("jpeg", pa.large_binary())]
IMAGES = pa.schema([*SOURCE_FIELDS, *PIXEL_FIELDS, *ERROR_FIELDS, RETRIES_FIELD, CLIPPED_FIELD])
"""What replicas take: `image` is height x width x 3 uint8 of the model's input size, `jpeg` a file that the replica
decodes; a good row has one of them, a failed row none."""

FAILED = pa.schema([SOURCE_FIELDS[0], SOURCE_FIELDS[1], *ERROR_FIELDS])
"""A row of `failed-*.parquet`."""

RECEIPTS = pa.schema(
    [
        pa.field("num_ok", pa.int64()),
        pa.field("failures", pa.list_(pa.string())),
        pa.field("files", pa.list_(pa.string())),
        pa.field("digests", pa.list_(pa.string())),
        pa.field("num_retries", pa.int64()),
        pa.field("num_clipped", pa.int64()),
    ]
)
"""What a write task reports to the driver: the reason of each failed row; names and SHA-256 of the files;
requests that were sent again; images of more than 8 bits of grey."""


def predictions_schema(topk: int, embedding_size: int) -> pa.Schema:
    """Rows on their way from the replicas to the writer; 0 leaves the columns out."""
    return pa.schema([*_good_fields(topk, embedding_size), *ERROR_FIELDS, RETRIES_FIELD, CLIPPED_FIELD])


def parts_schema(topk: int, embedding_size: int) -> pa.Schema:
    """A row of `part-*.parquet`."""
    return pa.schema(_good_fields(topk, embedding_size))


def _good_fields(topk: int, embedding_size: int) -> list[pa.Field]:
    fields = list(SOURCE_FIELDS)
    if topk:
        fields += [
            pa.field("index", pa.list_(pa.int32())),
            pa.field("prob", pa.list_(pa.float32())),
            pa.field("label", pa.list_(pa.string())),
        ]
    if embedding_size:
        fields.append(pa.field("embedding", pa.list_(pa.float32(), embedding_size)))
    return fields
