"""Parquet files that ecaray wrote itself: a damaged one is one clear line."""

import pyarrow as pa

from pipelines.errors import DamagedFileError
from pipelines.storage.bulk import read_columns


def read_own_table(uri: str, columns: list[str], advice: str) -> pa.Table:
    """Read columns of a Parquet file.

    Args:
        uri: of the file.
        columns: names; the file has to hold all of them.
        advice: what to do where the file is damaged, as the end of a sentence.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is damaged.
    """
    try:
        table = read_columns(uri, columns)
        if missing := set(columns) - set(table.column_names):
            raise ValueError(f"no column {min(missing)!r}")
        return table
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        # Arrow reports damage as OSError too, but without the number that the operating system's errors have.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).partition("\n")[0]
    raise DamagedFileError(f"{uri} is damaged ({reason}): {advice}")
