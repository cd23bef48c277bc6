"""Parquet files that ecaray wrote itself: a damaged one is one clear line."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa

from pipelines.errors import DamagedFileError
from pipelines.storage.bulk import read_columns, read_schema


def read_own_table(uri: str, columns: list[str] | None, advice: str) -> pa.Table:
    """Read columns of a Parquet file.

    Args:
        uri: of the file.
        columns: names; the file has to hold all of them. None for all that it holds.
        advice: what to do where the file is damaged, as the end of a sentence.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is damaged.
    """
    with _damage_in_one_line(uri, advice):
        table = read_columns(uri, columns)
        if missing := set(columns or []) - set(table.column_names):
            raise ValueError(f"no column {min(missing)!r}")
        return table


def read_own_schema(uri: str, advice: str) -> pa.Schema:
    """Read the schema of a Parquet file; arguments and errors as for `read_own_table`."""
    with _damage_in_one_line(uri, advice):
        return read_schema(uri)


@contextlib.contextmanager
def _damage_in_one_line(uri: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        # Arrow reports damage as OSError too, but without the number that the operating system's errors have.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise DamagedFileError(f"{uri} is damaged ({reason}): {advice}") from None
