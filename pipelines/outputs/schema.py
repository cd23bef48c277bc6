"""Schemas of an output's rows. They use plain Arrow types only, so that any Parquet reader can read them."""

from collections.abc import Iterable

import pyarrow as pa

from pipelines.outputs.columns import Model, ModelColumns

ERROR_FIELDS = [pa.field("error_kind", pa.string()), pa.field("error_message", pa.string())]
"""Error fields of a row, which are null in good rows and not written for them."""

SOURCE_FIELDS = [
    pa.field("id", pa.int64()),
    pa.field("uri", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]
"""Fields that identify the image of a row."""

WRITE_RESULTS = pa.schema(
    [
        pa.field("num_ok", pa.int64()),
        pa.field("failures", pa.list_(pa.string())),
        pa.field("files", pa.list_(pa.string())),
        pa.field("digests", pa.list_(pa.string())),
        pa.field("num_retries", pa.int64()),
        pa.field("num_clipped", pa.int64()),
    ]
)
"""Result that a write task reports to the driver: number of good rows, reason of each failed row, names and SHA-256 of
the files, number of retried requests, and number of grey images of more than 8 bits."""


def failed_schema(carried: Iterable[pa.Field] = ()) -> pa.Schema:
    """Return the schema of `failed-*.parquet`.

    Args:
        carried: Fields that are carried over from the input.
    """
    return pa.schema([SOURCE_FIELDS[0], SOURCE_FIELDS[1], *ERROR_FIELDS, *carried])


def parts_schema(columns: Iterable[ModelColumns], model: Model, carried: Iterable[pa.Field] = ()) -> pa.Schema:
    """Return the schema of `part-*.parquet`.

    Args:
        columns: Columns that the model computes.
        model: Facts about the model.
        carried: Fields that are carried over from the input.
    """
    computed = [field for group in columns for field in group.fields(model)]
    return pa.schema([*SOURCE_FIELDS, *computed, *carried])


RESERVED_NAMES = {
    *pa.schema(SOURCE_FIELDS).names,
    *failed_schema().names,
    "index",
    "prob",
    "label",
    "embedding",
    "num_retries",
    "is_clipped",
    "image",
    "jpeg",
    "etag",
}
"""Reserved names, which a column carried over from the input may not have."""
