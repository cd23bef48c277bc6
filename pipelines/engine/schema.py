"""Schemas of the tables that the stages exchange. Plain Arrow types only."""

from collections.abc import Iterable

import pyarrow as pa

from pipelines.outputs.columns import Model, ModelColumns
from pipelines.outputs.schema import ERROR_FIELDS, SOURCE_FIELDS, parts_schema

RETRIES_FIELD = pa.field("num_retries", pa.int32())
"""Number of retried requests for an image."""

CLIPPED_FIELD = pa.field("is_clipped", pa.bool_())
"""True for grayscale images with more than 8 bits, which timm's transform mostly turns white. Null in failed rows."""

PIXEL_FIELDS = [pa.field("image", pa.large_binary()), pa.field("jpeg", pa.large_binary())]
IMAGES = pa.schema([*SOURCE_FIELDS, *PIXEL_FIELDS, *ERROR_FIELDS, RETRIES_FIELD, CLIPPED_FIELD])
"""Input of the replicas. `image` is uint8, H x W x 3 of the model's input size; `jpeg` is a file that the replica
decodes. A good row has one of the two, a failed row has neither."""


def predictions_schema(columns: Iterable[ModelColumns], model: Model) -> pa.Schema:
    """Return the schema of the rows that replicas pass to the last stage.

    Args:
        columns: Columns that the model computes.
        model: Facts about the model.
    """
    return pa.schema([*parts_schema(columns, model), *ERROR_FIELDS, RETRIES_FIELD, CLIPPED_FIELD])
