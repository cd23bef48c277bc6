"""Readers: how the inputs of a job are listed, and how their bytes are read.

A reader is one form of input. It has two duties: `list` returns a table that locates each input, which is pinned as the
manifest; `read` returns the bytes of given rows, and a reason for each that cannot be read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from pipelines.storage.bulk import Fetched, fetch_many


@dataclass(frozen=True)
class ListRequest:
    """What to list.

    Attributes:
        uri: normalized; it exists.
        exclude: shell patterns on the path below `uri`.
        trust_list: whether a list that lies elsewhere may name files of this machine and hosts of its network.
        with_labels: whether each row needs a column `label`.
    """

    uri: str
    exclude: list[str]
    trust_list: bool = False
    with_labels: bool = False


@dataclass(frozen=True)
class Listing:
    """Inputs that were found.

    Attributes:
        table: a row for each input: `uri`, `size_bytes` (null where it is not known), `etag` (empty where it is not
            known), then the reader's locators, `label` where it was asked for, and the columns that are carried to the
            output.
        num_excluded: objects left out by a pattern, or as hidden and system files.
        linked: real paths of local folders that lie elsewhere, by the links that lead to them.
    """

    table: pa.Table
    num_excluded: int
    linked: dict[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """One form of input. Instances are pickled into the workers, so they hold no connections."""

    @property
    def name(self) -> str:
        """Name by which the manifest refers to the reader."""

    @property
    def locators(self) -> tuple[str, ...]:
        """Columns of the manifest that only `read` uses, such as an offset; they are not carried to the output."""

    def matches(self, uri: str) -> bool:
        """Return whether a normalized URI names this form of input, by its ending."""

    def list(self, request: ListRequest) -> Listing:
        """List the inputs.

        Raises:
            RequestError: there is nothing to read, the store refuses, or a label is missing.
        """

    def read(self, rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
        """Read the bytes of some inputs.

        Args:
            rows: of the listing's table; `etag` may be missing, or empty where a change does not matter.
            max_bytes: largest input read.

        Yields:
            One for each row, in any order. An input that cannot be read has an `ItemError` in place of its bytes.
        """


def read_objects(rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
    """Read each row's whole object, named by `uri`: `Reader.read` of every form whose inputs are objects."""
    etags = rows["etag"].to_pylist() if "etag" in rows.column_names else None
    return fetch_many(rows["uri"].to_pylist(), max_bytes, etags)
