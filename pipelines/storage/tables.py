"""Reads of Parquet files that ecaray wrote. A damaged file is a one-line error."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa

from pipelines.errors import DamagedFileError
from pipelines.storage.bulk import read_columns, read_schema


def read_own_table(uri: str, columns: list[str] | None, advice: str) -> pa.Table:
    """Read columns of a Parquet file.

    Args:
        uri: URI of the file.
        columns: Names of columns, all of which the file must have. None reads every column.
        advice: What to do if the file is damaged, as the last clause of the error message.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedFileError: The file is damaged.
    """
    with _translate_damage(uri, advice):
        table = read_columns(uri, columns)
        if missing := set(columns or []) - set(table.column_names):
            raise ValueError(f"no column {min(missing)!r}")
        return table


def read_own_schema(uri: str, advice: str) -> pa.Schema:
    """Read the schema of a Parquet file. See `read_own_table` for arguments and errors."""
    with _translate_damage(uri, advice):
        return read_schema(uri)


@contextlib.contextmanager
def _translate_damage(uri: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        # Arrow also reports damage as OSError, but without the errno that errors of the operating system carry. Its
        # FileNotFoundError has none either.
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = str(error).partition("\n")[0]
        raise DamagedFileError(f"{uri} is damaged ({reason}): {advice}") from None
