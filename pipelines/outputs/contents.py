"""Commit: which of its inputs an output already holds.

The ids in the files that count are the checkpoint: a rerun does what is missing.
"""

import functools
import json
import logging
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipelines.errors import DamagedFileError
from pipelines.inputs.idset import IdSet
from pipelines.outputs.commit_log import History, read_history
from pipelines.outputs.file_names import epoch_of, is_failed, list_files
from pipelines.outputs.lease import current_epoch
from pipelines.outputs.reasons import count_reasons, reasons_of
from pipelines.outputs.run_record import is_complete
from pipelines.outputs.writer import digest_of
from pipelines.storage import uris
from pipelines.storage.documents import parse_json
from pipelines.storage.filesystem import read_bytes, write_bytes
from pipelines.storage.tables import read_own_table

log = logging.getLogger(__name__)

NUM_READERS = 8
FILES_FILE = "_files.json"
ADVICE = "the same command makes it again"


@dataclass(frozen=True)
class Done:
    """What an output holds.

    Attributes:
        ids: those with a row that stays.
        names: of the Parquet files that stay.
        removed: of those that go: files of failed rows that are retried, and files whose rows other files hold.
        retried: ids of the rows that are retried.
        failures: how often each reason was given in the failed rows that stay.
    """

    ids: IdSet
    names: frozenset[str]
    removed: frozenset[str]
    retried: IdSet
    failures: Counter[str]


def find_done(output_uri: str, num_inputs: int, epoch: int, retried_kinds: Container[str] = ()) -> Done:
    """Read the ids in the files that count. Changes nothing.

    Args:
        output_uri: the output.
        num_inputs: rows of its manifest.
        epoch: of this run's lease.
        retried_kinds: a file of failed rows that holds one of these kinds is removed as a whole: whatever happens
            next, no image has two rows.

    Raises:
        DamagedFileError: a file is damaged, or holds ids that the manifest does not have.
    """
    history = read_history(output_uri, before_epoch=epoch)
    tables = _read_all(output_uri, _in_order(list_files(output_uri), history))
    uncounted = {name for name in tables if not history.may_count(name, epoch_of(name))}
    uncounted |= _replaced_by_merges(output_uri, history, tables)
    ids, retried, names = IdSet(num_inputs), IdSet(num_inputs), set[str]()
    failures: Counter[str] = Counter()
    for name, table in tables.items():
        if isinstance(table, DamagedFileError):
            if name in uncounted:
                continue
            raise table
        _refuse_unknown_ids(table, num_inputs, uris.join(output_uri, name))
        if name in uncounted:
            continue
        if is_failed(name) and any(kind in retried_kinds for kind in table["error_kind"].to_pylist()):
            retried.add(table["id"].to_numpy())
            continue
        if not _add_ids(ids, table, uris.join(output_uri, name)):
            continue
        names.add(name)
        if is_failed(name):
            count_reasons(failures, Counter(reasons_of(table)))
    return Done(ids, frozenset(names), frozenset(tables.keys() - names), retried, failures)


def is_as_recorded(output_uri: str, done: Done) -> bool:
    """Compare what a finished output holds with its record, `_files.json`.

    Raises:
        DamagedFileError: the record is damaged.
    """
    digests = read_digests(output_uri)
    is_whole = not done.removed and len(done.ids) == done.ids.size
    return is_whole and digests is not None and digests.keys() == done.names


def _in_order(listed: Iterable[str], history: History) -> list[str]:
    """Return names with those first that the last run counted, so that they win over late doubles."""
    counted = set(history.commits.files)
    return sorted(listed, key=lambda name: (name not in counted, name))


def _replaced_by_merges(
    output_uri: str, history: History, tables: Mapping[str, "pa.Table | DamagedFileError"]
) -> set[str]:
    """Names of the files whose rows a merged file holds, and of merged files that are not whole."""
    replaced: set[str] = set()
    for merge in history.commits.merges:
        target = tables.get(merge.target)
        if isinstance(target, pa.Table):
            replaced.update(merge.sources)
        elif target is not None and all(name in tables for name in merge.sources):
            log.info("%s is not whole; the files that it was made of count", uris.join(output_uri, merge.target))
            replaced.add(merge.target)
    return replaced & tables.keys()


def _refuse_unknown_ids(table: pa.Table, num_inputs: int, uri: str) -> None:
    ids = table["id"].to_numpy()
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_inputs:
        raise DamagedFileError(
            f"{uri} holds ids from {ids.min()} to {ids.max()}, and the manifest has {num_inputs} inputs: it belongs "
            "to another output, so move it there, or delete it"
        )


def _add_ids(ids: IdSet, table: pa.Table, uri: str) -> bool:
    """Add the ids of one file, unless another file holds one of them; returns whether they were added."""
    found = table["id"].to_numpy()
    if ids.overlaps(found):
        log.info("%s holds rows that other files hold: it does not count", uri)
        return False
    ids.add(found)
    return True


def _read_all(output_uri: str, names: Iterable[str]) -> dict[str, "pa.Table | DamagedFileError"]:
    """Read the ids of files, in order; a file that is damaged is its error, one that is gone is left out."""
    names = list(names)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        tables = pool.map(functools.partial(_read_ids, output_uri), names)
        return {name: table for name, table in zip(names, tables) if table is not None}


def _read_ids(output_uri: str, name: str) -> "pa.Table | DamagedFileError | None":
    columns = ["id", "error_kind", "error_message"] if is_failed(name) else ["id"]
    try:
        return read_own_table(
            uris.join(output_uri, name), columns, "delete it, and the same command computes its rows again"
        )
    except FileNotFoundError:
        return None
    except DamagedFileError as damage:
        return damage


def complete_digests(output_uri: str, written: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of every Parquet file of an output, by name.

    Args:
        output_uri: the output.
        written: of the files of this run. Files of a run that finished keep what it recorded; those of a run that was
            interrupted are read.
    """
    names = list_files(output_uri)
    digests = (read_digests(output_uri) or {}) | dict(written)
    digests = {name: digests[name] for name in names if name in digests}
    others = [name for name in names if name not in digests]
    return digests | dict(_digests_of(output_uri, others))


def _digests_of(output_uri: str, names: list[str]) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(NUM_READERS) as pool:
        yield from zip(names, pool.map(lambda name: digest_of(read_bytes(uris.join(output_uri, name))), names))


def list_counted(output_uri: str) -> list[str]:
    """Return the names of the Parquet files that count, in order; of an unfinished run, those written so far.

    Raises:
        DamagedFileError: a record of the output is damaged or gone.
    """
    if is_complete(output_uri):
        digests = read_digests(output_uri)
        if digests is None:
            raise DamagedFileError(f"{output_uri} is marked as finished, but {FILES_FILE} is gone: {ADVICE}")
        return sorted(digests)
    history = read_history(output_uri, before_epoch=current_epoch(output_uri) + 1)
    names = [name for name in list_files(output_uri) if history.may_count(name, epoch_of(name))]
    replaced = {source for merge in history.commits.merges if merge.target in names for source in merge.sources}
    return [name for name in names if name not in replaced]


def write_digests(output_uri: str, digests: Mapping[str, str]) -> None:
    """Write `_files.json`, the record of which files count, for `verify` and for the same command.

    Args:
        output_uri: the output.
        digests: SHA-256 of each Parquet file, by name.
    """
    write_bytes(uris.join(output_uri, FILES_FILE), json.dumps(digests, indent=2, sort_keys=True).encode())


def read_digests(output_uri: str) -> dict[str, str] | None:
    """Return the SHA-256 of every Parquet file by its name; None where no run ended here.

    Raises:
        DamagedFileError: the record is damaged.
    """
    uri = uris.join(output_uri, FILES_FILE)
    try:
        content = read_bytes(uri)
    except FileNotFoundError:
        return None
    return parse_json(uri, content, dict[str, str], f"delete it, and {ADVICE}")
