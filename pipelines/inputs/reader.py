"""Protocol for input readers, each of which lists and reads one form of input.

`Reader.list` returns a table that locates each input and is pinned as the manifest. `Reader.read` returns the bytes of
given rows, and an error for each row that cannot be read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from pipelines.storage.bulk import Fetched, fetch_many


@dataclass(frozen=True)
class ListRequest:
    """Request to list the inputs under a URI.

    Attributes:
        uri: Normalized URI, which exists.
        exclude: Shell patterns on the path below `uri`.
        trust_list: True to let a list from elsewhere name files on this machine and hosts in its network.
        with_labels: True if the listing needs a column `label`.
    """

    uri: str
    exclude: list[str]
    trust_list: bool = False
    with_labels: bool = False


@dataclass(frozen=True)
class Listing:
    """Inputs found under a URI.

    Attributes:
        table: One row per input: `uri`, `size_bytes` (null if unknown), `etag` (empty if unknown), then the reader's
            locators, `label` if requested, and the columns that are carried to the output.
        num_excluded: Number of objects that matched an exclude pattern or are hidden or system files.
        linked: Real paths of local folders outside the input, by the links that lead to them.
    """

    table: pa.Table
    num_excluded: int
    linked: dict[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """Reader of one form of input. Instances are pickled and sent to workers, so they must not hold connections."""

    @property
    def name(self) -> str:
        """Name by which the manifest refers to the reader."""

    @property
    def locators(self) -> tuple[str, ...]:
        """Manifest columns that only `read` uses, such as an offset. They are not carried to the output."""

    def matches(self, uri: str) -> bool:
        """Return whether a normalized URI names this form of input, judged by its suffix."""

    def list(self, request: ListRequest) -> Listing:
        """List the inputs.

        Raises:
            RequestError: There is nothing to read, the store fails, or a label is missing.
        """

    def read(self, rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
        """Read the bytes of some inputs.

        Args:
            rows: Rows of the listing's table. `etag` may be missing, or empty where a change does not matter.
            max_bytes: Size of the largest input read.

        Yields:
            One result per row, in any order. An input that cannot be read has an `ItemError` in place of its bytes.
        """


def read_objects(rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
    """Read the whole object at each row's `uri`. Implements `Reader.read` for forms whose inputs are objects."""
    etags = rows["etag"].to_pylist() if "etag" in rows.column_names else None
    return fetch_many(rows["uri"].to_pylist(), max_bytes, etags)
