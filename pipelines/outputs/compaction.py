"""Compaction: merges small committed files into files that are large enough to read efficiently, before `_SUCCESS`.

An interruption at any point neither loses nor duplicates rows: the commit log names each new file and its sources, a
new file is written atomically before the first source is removed, and from then on only the new file is committed.
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

# Files of at least MIN_BYTES are left alone. A group of smaller files is closed once it reaches FULL_BYTES, and so
# stays below 192 MiB. A remainder of less than MIN_BYTES joins the last group, which stays below 256 MiB. An output
# smaller than MIN_BYTES in total is not compacted.
MIN_BYTES = 64 << 20
FULL_BYTES = 128 << 20
# Files of failed rows are tiny, so they are grouped by number rather than by size.
MIN_FAILED_FILES, MAX_FAILED_FILES = 64, 1024
# Memory of a merge per byte of its sources: the files, their table, and the sorted table. A table of labels alone is
# several times the size of its compressed file.
MEMORY_PER_BYTE = 16
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Group:
    """Group of files to merge.

    Attributes:
        merge: Names of the sources and of the new file.
        num_bytes: Total size of the sources.
    """

    merge: Merge
    num_bytes: int


def plan_compaction(sizes: Mapping[str, int], epoch: int) -> list[Group]:
    """Group small files that are adjacent by id.

    Args:
        sizes: Size in bytes of each Parquet file of an output, by name.
        epoch: Epoch of the run's lease, which keeps the names of new files distinct from those of old ones.
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
        remainder = groups.pop()
        if groups:
            groups[-1] += remainder
    return groups


def _group_failed(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), MAX_FAILED_FILES):
        group = names[start : start + MAX_FAILED_FILES]
        if len(group) >= MIN_FAILED_FILES:
            yield group


def compact(groups: list[Group], commit_log: CommitLog, lease: Lease) -> dict[str, str]:
    """Merge each group in a Ray task, and return the SHA-256 of each new file by name.

    Raises:
        RunError: A merge failed, or the lease was lost. The same command resumes from there.
    """
    num_sources = sum(len(group.merge.sources) for group in groups)
    log.info("compacting %d small files into %d", num_sources, len(groups))
    commit_log.merge([group.merge for group in groups])
    task = ray.remote(num_cpus=1)(merge_files)
    max_memory = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]) / 2
    pending = [
        task.options(
            # Ray would wait forever for more memory than any node has.
            memory=int(min(MEMORY_PER_BYTE * group.num_bytes, max_memory)),
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
                log.info("compaction has written %d of %d files", len(digests), len(groups))
    except ray.exceptions.RayError as error:
        raise RunError(
            f"compaction failed: {root_cause(error)}; no rows are lost, and the same command resumes from there"
        ) from error
    return digests


def merge_files(fence: Fence, merge: Merge) -> tuple[str, str]:
    """Merge several files into one, remove the sources, and return the name and SHA-256 of the new file.

    The function is idempotent: an earlier attempt of the same task may have stopped at any point.
    """
    output_uri = fence.output_uri
    try:
        digest = digest_of(read_object(uris.join(output_uri, merge.target)))
    except FileNotFoundError:
        contents = [pa.BufferReader(read_object(uris.join(output_uri, name))) for name in merge.sources]
        tables = [pq.read_table(content) for content in contents]
        schema = tables[0].schema
        table = pa.concat_tables([table.cast(_with_large_strings(schema)) for table in tables])
        digest = write_table(output_uri, merge.target, table, schema, fence).digest
    for name in merge.sources:
        fence.check()
        remove(uris.join(output_uri, name))
    return merge.target, digest


def _with_large_strings(schema: pa.Schema) -> pa.Schema:
    """Return a schema whose string columns may exceed 2 GiB in total."""
    large = {pa.string(): pa.large_string(), pa.list_(pa.string()): pa.list_(pa.large_string())}
    return pa.schema([field.with_type(large.get(field.type, field.type)) for field in schema])
