"""Commit: which of its inputs an output already holds.

The ids in the files that are there are the checkpoint: a rerun does what is missing.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, read_bytes

NUM_READERS = 8


def find_done(output_uri: str, num_inputs: int) -> tuple[NDArray[np.bool_], int, int]:
    """Which ids the committed files hold.

    Args:
        output_uri: the output.
        num_inputs: rows of its manifest.

    Returns:
        One flag an id, the number of files, and how many of the ids are failed rows.
    """
    done = np.zeros(num_inputs, dtype=np.bool_)
    names = [name for name in list_names(output_uri) if name.endswith(".parquet")]

    def read_ids(name: str) -> NDArray[np.int64]:
        content = pa.BufferReader(read_bytes(uris.join(output_uri, name)))
        ids: NDArray[np.int64] = pq.read_table(content, columns=["id"])["id"].to_numpy()
        return ids

    num_failed = 0
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for name, ids in zip(names, pool.map(read_ids, names)):
            done[ids] = True
            num_failed += len(ids) if name.startswith("failed-") else 0
    return done, len(names), num_failed
