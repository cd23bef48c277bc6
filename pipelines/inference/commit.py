"""Commit: which of its inputs an output already holds.

The ids in the files that are there are the checkpoint: a rerun does what is missing.
"""

import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import run_record
from pipelines.inference.write import digest_of, reasons_of
from pipelines.storage import uris
from pipelines.storage.filesystem import in_plain_words, list_names, read_bytes, remove, write_bytes

log = logging.getLogger(__name__)

NUM_READERS = 8
FILES_FILE = "_files.json"
FILE_NAME = re.compile(r"(part|failed)-\d+\.parquet")


@dataclass(frozen=True)
class Done:
    """What an output holds.

    Attributes:
        flags: one an id, whether it has a row.
        names: of its Parquet files.
        failures: how often each reason was given in the failed rows.
    """

    flags: NDArray[np.bool_]
    names: frozenset[str]
    failures: Counter[str]


def find_done(output_uri: str, num_inputs: int) -> Done:
    """Read what the committed files hold, of the good ones the ids alone.

    Args:
        output_uri: the output.
        num_inputs: rows of its manifest.
    """
    flags = np.zeros(num_inputs, dtype=np.bool_)
    names = list_files(output_uri)
    failures: Counter[str] = Counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for name, table in zip(names, pool.map(functools.partial(_read_ids, output_uri), names)):
            flags[table["id"].to_numpy()] = True
            if _is_of_failed(name):
                failures.update(reasons_of(table))
    return Done(flags, frozenset(names), failures)


def list_files(output_uri: str) -> list[str]:
    """Names of the Parquet files that runs wrote, whatever else lies there."""
    return [name for name in list_names(output_uri) if FILE_NAME.fullmatch(name)]


def remove_strays(output_uri: str, names: Container[str]) -> None:
    """Remove files that hold what other files hold: of writes whose node or driver died before they were told of.

    Args:
        output_uri: the output.
        names: of the files that count.
    """
    for name in list_files(output_uri):
        if name not in names:
            log.info("%s is left from a broken attempt, and goes", name)
            remove(uris.join(output_uri, name))


def drop_failed(output_uri: str, kinds: Container[str]) -> int:
    """Remove each file of failed rows that holds one of these kinds, so that its images are missing again.

    A file goes as a whole and at once: whatever happens next, no image has two rows.

    Returns:
        How many rows went.
    """
    num_dropped = 0
    for name in filter(_is_of_failed, list_files(output_uri)):
        table = _read_ids(output_uri, name)
        if any(kind in kinds for kind in table["error_kind"].to_pylist()):
            with in_plain_words("write to", output_uri):
                run_record.mark_incomplete(output_uri)
                remove(uris.join(output_uri, name))
            num_dropped += table.num_rows
    return num_dropped


def write_digests(output_uri: str, written: Mapping[str, str]) -> None:
    """Write `_files.json`, the SHA-256 of every Parquet file by its name, for `verify`.

    Args:
        output_uri: the output.
        written: of the files of this run; those of a run that ended keep what it wrote down, those of a run that broke
            off are read for it.
    """
    names = list_files(output_uri)
    digests = (read_digests(output_uri) or {}) | dict(written)
    digests = {name: digests[name] for name in names if name in digests}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        others = [name for name in names if name not in digests]
        digests |= zip(others, pool.map(lambda name: digest_of(read_bytes(uris.join(output_uri, name))), others))
    write_bytes(uris.join(output_uri, FILES_FILE), json.dumps(digests, indent=2, sort_keys=True).encode())


def read_digests(output_uri: str) -> dict[str, str] | None:
    """The SHA-256 of every Parquet file by its name; None where no run ended here."""
    try:
        found: dict[str, str] = json.loads(read_bytes(uris.join(output_uri, FILES_FILE)))
    except FileNotFoundError:
        return None
    return found


def _is_of_failed(name: str) -> bool:
    return name.startswith("failed-")


def _read_ids(output_uri: str, name: str) -> pa.Table:
    content = pa.BufferReader(read_bytes(uris.join(output_uri, name)))
    columns = ["id", "error_kind", "error_message"] if _is_of_failed(name) else ["id"]
    return pq.read_table(content, columns=columns)
