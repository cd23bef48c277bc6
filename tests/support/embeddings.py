"""Comparison of embeddings."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def cosines(rows: pa.Table, others: pa.Table) -> NDArray[np.float64]:
    """Return the cosine similarities of the embeddings of two tables, row by row, without failed rows."""
    ours, theirs = (np.array(table["embedding"].drop_null().to_pylist(), np.float64) for table in (rows, others))
    found: NDArray[np.float64] = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return found
