"""An output's Parquet files: their names (`part-000000000000-e000003.parquet`) and how to list them.

A file is named for the smallest id in it and for the epoch of the lease that it was written under. Ids are unique, so
no two batches of an epoch share a name, and a batch that Ray runs again overwrites its own file. No two epochs share a
name either: a run that lost its lease cannot touch what its successor wrote.
"""

import re
from typing import Literal

from pipelines.storage.filesystem import list_names, list_with_sizes

Kind = Literal["part", "failed"]

# Before epochs, files were named for the id alone, those of a compaction with eight hexadecimal digits.
FILE_NAME = re.compile(r"(part|failed)-(\d+)(?:-e(\d+)(-merged)?|-[0-9a-f]{8})?\.parquet")


def file_name(kind: Kind, first_id: int, epoch: int) -> str:
    """Return the name of a file that a write task makes."""
    return f"{kind}-{first_id:012d}-e{epoch:06d}.parquet"


def merged_name(first_source: str, epoch: int) -> str:
    """Return the name of a file that a compaction makes of others, the first of them `first_source`."""
    kind, first_id = _parse(first_source).group(1, 2)
    return f"{kind}-{first_id}-e{epoch:06d}-merged.parquet"


def is_file(name: str) -> bool:
    """Return whether a name is one of ours."""
    return FILE_NAME.fullmatch(name) is not None


def kind_of(name: str) -> str:
    """Return `part` or `failed` for a file of ours; for any other name, its beginning."""
    return name.partition("-")[0]


def is_failed(name: str) -> bool:
    """Return whether a file of ours holds failed rows."""
    return name.startswith("failed-")


def epoch_of(name: str) -> int:
    """Return the epoch that a file of ours was written under; 0 before there were epochs."""
    return int(_parse(name)[3] or 0)


def list_files(output_uri: str) -> list[str]:
    """Return the names of the Parquet files that runs wrote, in order, whatever else lies there."""
    return [name for name in list_names(output_uri) if is_file(name)]


def list_sizes(output_uri: str) -> dict[str, int]:
    """Return the bytes of the same files, by name."""
    return {name: size for name, size in list_with_sizes(output_uri).items() if is_file(name)}


def _parse(name: str) -> re.Match[str]:
    found = FILE_NAME.fullmatch(name)
    assert found is not None, name
    return found
