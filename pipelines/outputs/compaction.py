"""Compaction: many small committed files become few that are large enough to be read well, before `_SUCCESS`.

Wherever it is interrupted, nothing is lost and nothing stays doubled: the commit log names each new file and those
whose rows it takes, a new file is written whole before the first of the others is removed, and from then on only the
new one counts.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.errors import RunError, root_cause
from pipelines.outputs.commit_log import CommitLog, Merge
from pipelines.outputs.file_names import merged_name
from pipelines.outputs.lease import Fence, Lease
from pipelines.outputs.writer import digest_of, write_table
from pipelines.storage import uris
from pipelines.storage.bulk import read_object
from pipelines.storage.filesystem import remove

log = logging.getLogger(__name__)

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
        merge: their names, and the name of the new file.
        num_bytes: of the sources.
    """

    merge: Merge
    num_bytes: int


def plan_compaction(sizes: Mapping[str, int], epoch: int) -> list[Group]:
    """Group small files, neighbours by id.

    Args:
        sizes: bytes of each Parquet file of an output, by name.
        epoch: of the run's lease, so that no new file has the name of an old one.
    """
    names = sorted(sizes)
    parts = [name for name in names if name.startswith("part-") and sizes[name] < MIN_BYTES]
    failed = [name for name in names if name.startswith("failed-")]
    return [
        Group(Merge(target=merged_name(group[0], epoch), sources=group), sum(sizes[name] for name in group))
        for group in (*_group_parts(parts, sizes), *_group_failed(failed))
        if len(group) > 1
    ]


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


def compact(groups: list[Group], commit_log: CommitLog, lease: Lease) -> dict[str, str]:
    """Make the groups' files, each in a Ray task; returns the SHA-256 of each, by its name.

    Raises:
        RunError: one could not be made, or the lease was lost. The same command goes on from there.
    """
    num_sources = sum(len(group.merge.sources) for group in groups)
    log.info("making %d files of %d small ones", len(groups), num_sources)
    commit_log.merge([group.merge for group in groups])
    task = ray.remote(num_cpus=1)(merge_files)
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]) / 2
    pending = [
        task.options(
            memory=int(min(MEMORY_PER_BYTE * group.num_bytes, most)),  # what no node has would be waited for for ever
            name=f"compact {group.merge.target}",
        ).remote(commit_log.fence, group.merge)
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
    return digests


def merge_files(fence: Fence, merge: Merge) -> tuple[str, str]:
    """Make one file of several, then remove these; returns its name and its SHA-256.

    An earlier attempt of the same task may have come any part of the way.
    """
    output_uri = fence.output_uri
    try:
        digest = digest_of(read_object(uris.join(output_uri, merge.target)))
    except FileNotFoundError:
        contents = [pa.BufferReader(read_object(uris.join(output_uri, name))) for name in merge.sources]
        tables = [pq.read_table(content) for content in contents]
        schema = tables[0].schema
        table = pa.concat_tables([table.cast(_wide(schema)) for table in tables])
        digest = write_table(output_uri, merge.target, table, schema, fence).digest
    for name in merge.sources:
        fence.check()
        remove(uris.join(output_uri, name))
    return merge.target, digest


def _wide(schema: pa.Schema) -> pa.Schema:
    """With strings that may take more than 2 GiB together."""
    wide = {pa.string(): pa.large_string(), pa.list_(pa.string()): pa.list_(pa.large_string())}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])
