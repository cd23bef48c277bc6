"""Compaction: many small committed files become few that are large enough to be read well, before `_SUCCESS`.

Whenever it is broken off, nothing is lost and nothing stays doubled: `_compaction.json` names each new file and those
whose rows it takes, and a new file is written whole before the first of the others goes. What was left half done,
`settle_compaction` ends.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.errors import RunError, root_cause
from pipelines.inference.write import digest_of, write_table
from pipelines.storage import uris
from pipelines.storage.bulk import read_columns, read_object
from pipelines.storage.filesystem import list_names, read_bytes, remove, write_bytes
from pipelines.storage.lease import Lease

log = logging.getLogger(__name__)

JOURNAL = "_compaction.json"
# Larger files are left alone. A group of smaller ones is full at the second size, and so below 192 MiB; what is left
# over, less than the first size, joins the last group, which stays below 256 MiB. An output that is small as a whole
# stays as it is.
MIN_BYTES = 64 << 20
FULL_BYTES = 128 << 20
# Files of failed rows hold a few each, and never come near those sizes.
MIN_FAILED_FILES, MAX_FAILED_FILES = 64, 1024
# The files as read, their table, and that table sorted: of labels alone, a table is several times its file.
MEMORY_PER_BYTE = 16
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Group:
    """Files that become one.

    Attributes:
        target: name of the new file.
        sources: names of those whose rows it takes.
        num_bytes: of the sources.
    """

    target: str
    sources: list[str]
    num_bytes: int


def plan_compaction(sizes: Mapping[str, int]) -> list[Group]:
    """Group small files, neighbours by id.

    Args:
        sizes: bytes of each Parquet file of an output, by name.
    """
    names = sorted(sizes)
    mark = uuid.uuid4().hex[:8]  # so that no new file has the name of an old one
    parts = [name for name in names if name.startswith("part-") and sizes[name] < MIN_BYTES]
    failed = [name for name in names if name.startswith("failed-")]
    return [
        Group(_target(group[0], mark), group, sum(sizes[name] for name in group))
        for group in (*_group_parts(parts, sizes), *_group_failed(failed))
        if len(group) > 1
    ]


def _target(first_source: str, mark: str) -> str:
    kind, number = first_source.removesuffix(".parquet").split("-")[:2]
    return f"{kind}-{number}-{mark}.parquet"


def _group_parts(names: list[str], sizes: Mapping[str, int]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name in names:
        groups[-1].append(name)
        num_bytes += sizes[name]
        if num_bytes >= FULL_BYTES:
            groups.append([])
            num_bytes = 0
    if num_bytes < MIN_BYTES:
        left = groups.pop()
        if groups:
            groups[-1] += left
    return groups


def _group_failed(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), MAX_FAILED_FILES):
        group = names[start : start + MAX_FAILED_FILES]
        if len(group) >= MIN_FAILED_FILES:
            yield group


def compact(output_uri: str, groups: list[Group], lease: Lease) -> dict[str, str]:
    """Make the groups' files, each in a task of Ray's; returns the SHA-256 of each, by its name.

    Raises:
        RunError: one could not be made, or the lease was lost. The same command goes on from there.
    """
    num_sources = sum(len(group.sources) for group in groups)
    log.info("making %d files of %d small ones", len(groups), num_sources)
    write_bytes(uris.join(output_uri, JOURNAL), json.dumps([asdict(group) for group in groups]).encode())
    task = ray.remote(num_cpus=1)(compact_group)
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]) / 2
    pending = [
        task.options(
            memory=int(min(MEMORY_PER_BYTE * group.num_bytes, most)),  # what no node has would be waited for for ever
            name=f"compact {group.target}",
        ).remote(output_uri, group)
        for group in groups
    ]
    digests: dict[str, str] = {}
    try:
        while pending:
            ready, pending = ray.wait(pending, timeout=REPORT_EVERY_S)
            lease.check()
            digests |= dict(ray.get(ready))
            if pending and not ready:
                log.info("%d of %d files are made", len(digests), len(groups))
    except ray.exceptions.RayError as error:
        raise RunError(f"{root_cause(error)}; nothing is lost, and the same command goes on from there") from error
    remove(uris.join(output_uri, JOURNAL))
    return digests


def compact_group(output_uri: str, group: Group) -> tuple[str, str]:
    """Make one file, whatever an earlier attempt left; returns its name and its SHA-256."""
    try:
        digest = digest_of(read_object(uris.join(output_uri, group.target)))
    except FileNotFoundError:
        contents = [pa.BufferReader(read_object(uris.join(output_uri, name))) for name in group.sources]
        tables = [pq.read_table(content) for content in contents]
        schema = tables[0].schema
        table = pa.concat_tables([table.cast(_wide(schema)) for table in tables])
        digest = write_table(output_uri, group.target, table, schema).digest
    _remove_sources(output_uri, group)
    return group.target, digest


def settle_compaction(output_uri: str) -> None:
    """End what a compaction that broke off left: where a new file is there, those whose rows it took go."""
    names = list_names(output_uri)
    if JOURNAL not in names:
        return
    for entry in json.loads(read_bytes(uris.join(output_uri, JOURNAL))):
        group = Group(**entry)
        if group.target in names and _is_whole(output_uri, group.target):
            _remove_sources(output_uri, group)
    remove(uris.join(output_uri, JOURNAL))


def _is_whole(output_uri: str, name: str) -> bool:
    """Whether a file has its end; where a store shows files half written, one that has not goes."""
    try:
        read_columns(uris.join(output_uri, name), ["id"])
    except pa.ArrowInvalid:
        remove(uris.join(output_uri, name))
        return False
    return True


def _wide(schema: pa.Schema) -> pa.Schema:
    """With strings that may take more than 2 GiB together."""
    wide = {pa.string(): pa.large_string(), pa.list_(pa.string()): pa.list_(pa.large_string())}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])


def _remove_sources(output_uri: str, group: Group) -> None:
    for name in group.sources:
        remove(uris.join(output_uri, name))
