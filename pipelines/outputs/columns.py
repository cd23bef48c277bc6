"""Columns of an output that are computed from the results of the model: top-k, embedding and registered ones.

Importable without torch: the methods are called with tensors, but need only their methods.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config.sections import OutputsConfig

if TYPE_CHECKING:
    import torch


class Model(Protocol):
    """Facts about a model that columns depend on."""

    @property
    def num_features(self) -> int:
        """Length of the features."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""


class Tolerance(NamedTuple):
    """Difference that another machine, a GPU or another batch size may cause in a row that is computed again.

    Attributes:
        prob: Absolute difference of a probability.
        embedding: Difference of the features, relative to their norm.
    """

    prob: float
    embedding: float


class ModelColumns(Protocol):
    """One or more columns that are computed together.

    Instances are pickled into the replicas, so that their module has to be importable there.

    Attributes:
        name: Name by which the record of a run refers to the columns.
    """

    name: str

    def fields(self, model: Model) -> list[pa.Field]:
        """Return the Arrow fields of the columns: plain types, and no nulls in good rows."""

    def compute(self, logits: "torch.Tensor", features: "torch.Tensor") -> list["torch.Tensor"]:
        """Compute the values of a batch on the device of the replica.

        Args:
            logits: Logits in the precision of the model, batch x num_classes.
            features: Pooled features in the precision of the model, batch x num_features.

        Returns:
            Tensors with a row for each image. All of them are copied to the host at once.
        """

    def arrays(self, values: list[NDArray[Any]], model: Model) -> list[pa.Array]:
        """Convert the copied tensors to one Arrow array for each field."""

    def difference(self, old: dict[str, Any], new: dict[str, Any], tolerance: Tolerance) -> str | None:
        """Compare a row of the output with the same row computed again, for `jobs.verify`.

        Returns:
            What differs by more than the tolerance; None if nothing does.
        """


@dataclass(frozen=True)
class TopK:
    """The `k` classes of the highest probability: `index`, `prob` and `label`."""

    k: int
    name = "topk"

    def fields(self, model: Model) -> list[pa.Field]:
        """See `ModelColumns`."""
        types = {"index": pa.int32(), "prob": pa.float32(), "label": pa.string()}
        return [pa.field(name, pa.list_(item)) for name, item in types.items()]

    def compute(self, logits: "torch.Tensor", features: "torch.Tensor") -> list["torch.Tensor"]:
        """See `ModelColumns`."""
        return list(logits.float().softmax(dim=-1).topk(self.k))

    def arrays(self, values: list[NDArray[Any]], model: Model) -> list[pa.Array]:
        """See `ModelColumns`."""
        prob, index = values
        offsets = pa.array(np.arange(0, index.size + 1, self.k), pa.int32())
        flat = pa.array(index.reshape(-1).astype(np.int32))
        flat_columns = (flat, pa.array(prob.reshape(-1)), _string_array(model.label_names).take(flat))
        return [pa.ListArray.from_arrays(offsets, column) for column in flat_columns]

    def difference(self, old: dict[str, Any], new: dict[str, Any], tolerance: Tolerance) -> str | None:
        """See `ModelColumns`."""
        before, after = np.array(old["prob"], np.float64), np.array(new["prob"], np.float64)
        is_clear = len(after) < 2 or after[0] - after[1] > 2 * tolerance.prob
        if (is_clear and old["index"][0] != new["index"][0]) or np.abs(before - after).max() > tolerance.prob:
            return f"the probability of class {old['index'][0]} was {before[0]:.5f} and is now {after[0]:.5f}"
        return None


@dataclass(frozen=True)
class Embedding:
    """The pooled features of the model: `embedding`."""

    name = "embedding"

    def fields(self, model: Model) -> list[pa.Field]:
        """See `ModelColumns`."""
        return [pa.field("embedding", pa.list_(pa.float32(), model.num_features))]

    def compute(self, logits: "torch.Tensor", features: "torch.Tensor") -> list["torch.Tensor"]:
        """See `ModelColumns`."""
        return [features.float()]

    def arrays(self, values: list[NDArray[Any]], model: Model) -> list[pa.Array]:
        """See `ModelColumns`."""
        return [pa.FixedSizeListArray.from_arrays(values[0].reshape(-1), model.num_features)]

    def difference(self, old: dict[str, Any], new: dict[str, Any], tolerance: Tolerance) -> str | None:
        """See `ModelColumns`."""
        before, after = np.array(old["embedding"], np.float64), np.array(new["embedding"], np.float64)
        distance = float(np.linalg.norm(before - after) / np.linalg.norm(after))
        return f"the embedding differs by {distance:.2g} of its norm" if distance > tolerance.embedding else None


@functools.lru_cache(maxsize=1)
def _string_array(names: tuple[str, ...]) -> pa.Array:
    return pa.array(names, pa.string())


registered: list[ModelColumns] = []
"""Columns that every output of this process has besides those of its config."""


def register(columns: ModelColumns) -> None:
    """Add columns to every output that this process writes or verifies.

    Raises:
        ValueError: There are columns of this name already.
    """
    if columns.name in {TopK.name, Embedding.name, *(other.name for other in registered)}:
        raise ValueError(f"there are columns named {columns.name!r} already")
    registered.append(columns)


def floating_fields(schema: pa.Schema) -> list[pa.Field]:
    """Return the fields whose values, or whose lists' values, are floating-point numbers."""
    return [field for field in schema if pa.types.is_floating(getattr(field.type, "value_type", field.type))]


def values_of(column: pa.Array) -> NDArray[Any]:
    """Return the values of a column, or of its lists, one after the other."""
    values: NDArray[Any] = (column.flatten() if hasattr(column.type, "value_type") else column).to_numpy()
    return values


def chosen_columns(outputs: OutputsConfig) -> tuple[ModelColumns, ...]:
    """Return the columns that a config asks for, then the registered ones, in the order of the output."""
    built_in: list[ModelColumns] = [TopK(outputs.topk)] if outputs.topk else []
    built_in += [Embedding()] if outputs.embedding else []
    return (*built_in, *registered)
