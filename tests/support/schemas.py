"""Columns and schemas of outputs, by number of classes per row and length of the embedding."""

from types import SimpleNamespace

import pyarrow as pa

from pipelines.config.sections import OutputsConfig
from pipelines.engine.schema import predictions_schema
from pipelines.outputs.columns import ModelColumns, chosen_columns
from pipelines.outputs.schema import parts_schema


def columns_of(topk: int, embedding: bool) -> tuple[ModelColumns, ...]:
    return chosen_columns(OutputsConfig(topk=topk, embedding=embedding))


def schema_of_parts(topk: int, num_features: int) -> pa.Schema:
    """Return the schema of `part-*.parquet`. 0 omits the columns."""
    return parts_schema(columns_of(topk, num_features > 0), _model(num_features))


def schema_of_predictions(topk: int, num_features: int) -> pa.Schema:
    """Return the schema of the rows of a replica. 0 omits the columns."""
    return predictions_schema(columns_of(topk, num_features > 0), _model(num_features))


def _model(num_features: int) -> SimpleNamespace:
    return SimpleNamespace(num_features=num_features, label_names=())
