"""Names of an output's Parquet files, such as `part-000000000000-e000003.parquet`.

A name contains the smallest id in the file and the epoch of the lease under which it was written. Ids are unique, so
no two batches of an epoch share a name, and a batch that Ray runs again overwrites its own file. No two epochs share a
name either, so a run that lost its lease cannot overwrite files of its successor.
"""

import re
from typing import Literal

from pipelines.storage.filesystem import list_names, list_with_sizes

Kind = Literal["part", "failed"]

# Versions before epochs existed used the id alone, and eight hexadecimal digits for compacted files.
FILE_NAME = re.compile(r"(part|failed)-(\d+)(?:-e(\d+)(-merged)?|-[0-9a-f]{8})?\.parquet")


def file_name(kind: Kind, first_id: int, epoch: int) -> str:
    """Return the name of a file written by a write task."""
    return f"{kind}-{first_id:012d}-e{epoch:06d}.parquet"


def merged_name(first_source: str, epoch: int) -> str:
    """Return the name of a compacted file whose first source is `first_source`."""
    kind, first_id = _parse(first_source).group(1, 2)
    return f"{kind}-{first_id}-e{epoch:06d}-merged.parquet"


def is_file(name: str) -> bool:
    """Return whether a name is that of a part or failed file."""
    return FILE_NAME.fullmatch(name) is not None


def kind_of(name: str) -> str:
    """Return `part` or `failed` for a part or failed file. For any other name, return the text before the first "-"."""
    return name.partition("-")[0]


def is_failed(name: str) -> bool:
    """Return whether a file holds failed rows."""
    return name.startswith("failed-")


def epoch_of(name: str) -> int:
    """Return the epoch under which a part or failed file was written, or 0 if its name has none."""
    return int(_parse(name)[3] or 0)


def list_files(output_uri: str) -> list[str]:
    """Return the sorted names of the part and failed files of an output."""
    return [name for name in list_names(output_uri) if is_file(name)]


def list_sizes(output_uri: str) -> dict[str, int]:
    """Return the sizes in bytes of the part and failed files of an output, by name."""
    return {name: size for name, size in list_with_sizes(output_uri).items() if is_file(name)}


def _parse(name: str) -> re.Match[str]:
    found = FILE_NAME.fullmatch(name)
    assert found is not None, name
    return found
