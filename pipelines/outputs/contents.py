"""Contents of an output: its committed files, the ids in them, and their checksums.

The ids in the committed files are the checkpoint: a rerun computes the ids that are missing.
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
ADVICE = "run the same command again to recreate it"
# For part and failed files.
FILE_ADVICE = "delete it and run the same command again to recompute its rows"


@dataclass(frozen=True)
class Done:
    """Rows and files that an output already holds.

    Attributes:
        ids: Ids whose rows are kept.
        names: Names of the Parquet files that are kept.
        removed: Names of the files to remove: those with failed rows to retry, and those whose rows other files hold.
        retried: Ids of the failed rows to retry.
        failures: Number of kept failed rows by reason.
    """

    ids: IdSet
    names: frozenset[str]
    removed: frozenset[str]
    retried: IdSet
    failures: Counter[str]


def find_done(output_uri: str, num_inputs: int, epoch: int, retried_kinds: Container[str] = ()) -> Done:
    """Read the ids in the committed files, without changing the output.

    Args:
        output_uri: URI of the output.
        num_inputs: Number of rows in its manifest.
        epoch: Epoch of this run's lease.
        retried_kinds: Error kinds to retry. A file of failed rows that contains one of them is removed as a whole, so
            that no image can end up with two rows.

    Raises:
        DamagedFileError: A file is damaged, or contains ids that are not in the manifest.
    """
    history = read_history(output_uri, before_epoch=epoch)
    tables = _read_all(output_uri, _in_order(list_files(output_uri), history))
    uncommitted = {name for name in tables if not history.is_committed(name, epoch_of(name))}
    uncommitted |= _replaced_by_merges(output_uri, history, tables)
    ids, retried, names = IdSet(num_inputs), IdSet(num_inputs), set[str]()
    failures: Counter[str] = Counter()
    for name, table in tables.items():
        if isinstance(table, DamagedFileError):
            if name in uncommitted:
                continue
            raise table
        _refuse_unknown_ids(table, num_inputs, uris.join(output_uri, name))
        if name in uncommitted:
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


def matches_record(output_uri: str, done: Done) -> bool:
    """Return whether a finished output is complete and has exactly the files recorded in `_files.json`.

    Raises:
        DamagedFileError: The record is damaged.
    """
    digests = read_digests(output_uri)
    is_complete_set = not done.removed and len(done.ids) == done.ids.size
    return is_complete_set and digests is not None and digests.keys() == done.names


def _in_order(listed: Iterable[str], history: History) -> list[str]:
    """Sort names so that files committed by the last run come first and win over late duplicates."""
    committed = set(history.commits.files)
    return sorted(listed, key=lambda name: (name not in committed, name))


def _replaced_by_merges(
    output_uri: str, history: History, tables: Mapping[str, "pa.Table | DamagedFileError"]
) -> set[str]:
    """Return the names of files that a merged file replaces, and of merged files that are damaged."""
    replaced: set[str] = set()
    for merge in history.commits.merges:
        target = tables.get(merge.target)
        if isinstance(target, pa.Table):
            replaced.update(merge.sources)
        elif target is not None and all(name in tables for name in merge.sources):
            log.info("%s is damaged: using the files that it was merged from", uris.join(output_uri, merge.target))
            replaced.add(merge.target)
    return replaced & tables.keys()


def _refuse_unknown_ids(table: pa.Table, num_inputs: int, uri: str) -> None:
    ids = table["id"].to_numpy()
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_inputs:
        raise DamagedFileError(
            f"{uri} contains ids from {ids.min()} to {ids.max()}, but the manifest has {num_inputs} inputs: move the "
            "file away if it belongs to another output; else restore _manifest from a copy"
        )


def _add_ids(ids: IdSet, table: pa.Table, uri: str) -> bool:
    """Add the ids of one file unless another file holds any of them, and return whether they were added."""
    found = table["id"].to_numpy()
    if ids.overlaps(found):
        log.info("%s duplicates rows of other files: ignoring it", uri)
        return False
    ids.add(found)
    return True


def _read_all(output_uri: str, names: Iterable[str]) -> dict[str, "pa.Table | DamagedFileError"]:
    """Read the ids of files, in order. A damaged file maps to its error, and a missing file is left out."""
    names = list(names)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        tables = pool.map(functools.partial(_read_ids, output_uri), names)
        return {name: table for name, table in zip(names, tables) if table is not None}


def _read_ids(output_uri: str, name: str) -> "pa.Table | DamagedFileError | None":
    columns = ["id", "error_kind", "error_message"] if is_failed(name) else ["id"]
    try:
        return read_own_table(uris.join(output_uri, name), columns, FILE_ADVICE)
    except FileNotFoundError:
        return None
    except DamagedFileError as damage:
        return damage


def complete_digests(output_uri: str, written: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of every Parquet file of an output, by name.

    Digests of files from finished runs come from the record. Files from interrupted runs are read.

    Args:
        output_uri: URI of the output.
        written: Digests of the files that this run wrote, by name.
    """
    names = list_files(output_uri)
    digests = (read_digests(output_uri) or {}) | dict(written)
    digests = {name: digests[name] for name in names if name in digests}
    others = [name for name in names if name not in digests]
    return digests | dict(_digests_of(output_uri, others))


def _digests_of(output_uri: str, names: list[str]) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(NUM_READERS) as pool:
        yield from zip(names, pool.map(lambda name: digest_of(read_bytes(uris.join(output_uri, name))), names))


def list_committed(output_uri: str) -> list[str]:
    """Return the sorted names of the committed Parquet files. For an unfinished run, these are the files so far.

    Raises:
        DamagedFileError: A record of the output is damaged or missing.
    """
    if is_complete(output_uri):
        digests = read_digests(output_uri)
        if digests is None:
            raise DamagedFileError(f"{output_uri} is marked as finished, but {FILES_FILE} is missing: {ADVICE}")
        return sorted(digests)
    history = read_history(output_uri, before_epoch=current_epoch(output_uri) + 1)
    names = [name for name in list_files(output_uri) if history.is_committed(name, epoch_of(name))]
    replaced = {source for merge in history.commits.merges if merge.target in names for source in merge.sources}
    return [name for name in names if name not in replaced]


def write_digests(output_uri: str, digests: Mapping[str, str]) -> None:
    """Write `_files.json`, the record of the committed files, for `verify` and for reruns.

    Args:
        output_uri: URI of the output.
        digests: SHA-256 of each Parquet file, by name.
    """
    write_bytes(uris.join(output_uri, FILES_FILE), json.dumps(digests, indent=2, sort_keys=True).encode())


def read_digests(output_uri: str) -> dict[str, str] | None:
    """Return the recorded SHA-256 of every Parquet file by name, or None if no run has finished.

    Raises:
        DamagedFileError: The record is damaged.
    """
    uri = uris.join(output_uri, FILES_FILE)
    try:
        content = read_bytes(uri)
    except FileNotFoundError:
        return None
    return parse_json(uri, content, dict[str, str], f"delete it, and {ADVICE}")
