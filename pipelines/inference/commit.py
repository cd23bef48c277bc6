"""Commit: which of its inputs an output already holds.

The ids in the files that are there are the checkpoint: a rerun does what is missing.
"""

import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipelines import run_record
from pipelines.inference.compact import settle_compaction
from pipelines.inference.failures import count_reasons
from pipelines.inference.idset import IdSet
from pipelines.inference.write import digest_of, reasons_of
from pipelines.storage import uris
from pipelines.storage.bulk import read_columns
from pipelines.storage.filesystem import (
    in_plain_words,
    list_names,
    list_with_sizes,
    read_bytes,
    remove,
    write_bytes,
)

log = logging.getLogger(__name__)

NUM_READERS = 8
FILES_FILE = "_files.json"
# The last eight are of a compaction.
FILE_NAME = re.compile(r"(part|failed)-\d+(-[0-9a-f]{8})?\.parquet")


@dataclass(frozen=True)
class Done:
    """What an output holds.

    Attributes:
        ids: those with a row that stays.
        names: of the Parquet files that stay.
        retried: names of the files of failed rows that go, to be done anew.
        failures: how often each reason was given in the failed rows that stay.
    """

    ids: IdSet
    names: frozenset[str]
    retried: frozenset[str]
    failures: Counter[str]


def find_done(output_uri: str, num_inputs: int, retried_kinds: Container[str] = ()) -> Done:
    """Read what the committed files hold, of the good ones the ids alone.

    Args:
        output_uri: the output.
        num_inputs: rows of its manifest.
        retried_kinds: each file of failed rows that holds one of these goes as a whole, and so at once: whatever
            happens next, no image has two rows.
    """
    settle_compaction(output_uri)
    ids = IdSet(num_inputs)
    names = list_files(output_uri)
    retried: set[str] = set()
    failures: Counter[str] = Counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for name, table in zip(names, pool.map(functools.partial(_read_ids, output_uri), names)):
            if _is_of_failed(name):
                if any(kind in retried_kinds for kind in table["error_kind"].to_pylist()):
                    retried.add(name)
                    continue
                count_reasons(failures, Counter(reasons_of(table)))
            ids.add(table["id"].to_numpy())
    return Done(ids, frozenset(names) - retried, frozenset(retried), failures)


def drop_retried(output_uri: str, retried: Collection[str]) -> None:
    """Remove files of failed rows, so that their images are missing again."""
    with in_plain_words("write to", output_uri):
        if retried:
            run_record.mark_incomplete(output_uri)
            remove(uris.join(output_uri, FILES_FILE))  # a file that is written anew may have its old name
        for name in retried:
            remove(uris.join(output_uri, name))


def list_files(output_uri: str) -> list[str]:
    """Names of the Parquet files that runs wrote, whatever else lies there."""
    return [name for name in list_names(output_uri) if FILE_NAME.fullmatch(name)]


def list_sizes(output_uri: str) -> dict[str, int]:
    """Bytes of the same files, by name."""
    return {name: size for name, size in list_with_sizes(output_uri).items() if FILE_NAME.fullmatch(name)}


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
    columns = ["id", "error_kind", "error_message"] if _is_of_failed(name) else ["id"]
    return read_columns(uris.join(output_uri, name), columns)
