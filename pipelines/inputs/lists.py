"""Lists of labelled images: CSV, TSV, JSON lines and Parquet files with the columns `uri` and `label`."""

import posixpath
import re
from collections.abc import Callable
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipelines.config.uri import check_uri, expand_home, refuse_secrets
from pipelines.errors import RequestError
from pipelines.inputs.hosts import private_hosts
from pipelines.storage import uris
from pipelines.storage.filesystem import read_bytes, translate_storage_errors

LABELLED_SCHEMA = pa.schema([("uri", pa.string()), ("label", pa.string())])
# A line of a list is read whole. Arrow's default is 1 MiB.
BLOCK_BYTES = 16 * 1024**2
# Protocols whose URIs name a bucket of a public service, not a host to connect to.
OBJECT_STORES = ("abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "oss", "s3", "wasb", "wasbs")


def list_suffix(location: str) -> str | None:
    """Return the suffix, in lower case, by which a location names a list; None for all others."""
    path = re.split(r"[?#]", location, maxsplit=1)[0] if uris.protocol_of(location) in ("http", "https") else location
    suffix = posixpath.splitext(path)[1].lower()
    return suffix if suffix in READERS else None


def read_list(location: str, *, trust_list: bool) -> pa.Table:
    """Read a list of images and labels.

    Args:
        location: normalized URI for which `list_suffix` is not None. Entries that are neither absolute nor of a
            protocol are relative to its folder.
        trust_list: whether a list that is not on this machine may name files of this machine and hosts of its network.

    Returns:
        `LABELLED_SCHEMA`, every URI normalized.

    Raises:
        RequestError: the file is no list, or one of its rows cannot be used.
    """
    suffix = list_suffix(location)
    assert suffix is not None
    with translate_storage_errors("read the list", location):
        content = read_bytes(location)
    try:
        table = READERS[suffix](content)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{location} cannot be read: {' '.join(str(error).split())}") from None
    repeated = next((name for name in LABELLED_SCHEMA.names if table.column_names.count(name) > 1), None)
    if repeated:
        raise RequestError(f"{location} has more than one column {repeated!r}: keep one of them")
    missing = [name for name in LABELLED_SCHEMA.names if name not in table.column_names]
    if missing:
        raise RequestError(f"{location} has no column {' or '.join(missing)}; it has: {', '.join(table.column_names)}")
    try:
        table = table.select(LABELLED_SCHEMA.names).cast(LABELLED_SCHEMA)
    except pa.ArrowException as error:
        raise RequestError(f"{location}: uri and label are to be text or numbers: {error}") from None
    if not table.num_rows:
        raise RequestError(f"no input: {location} lists no image")
    _refuse_empty(location, table)
    resolved = _resolve(location, table["uri"].to_pylist(), trust_list)
    return table.set_column(0, "uri", pa.array(resolved, pa.string()))


def _read_csv(content: bytes, delimiter: str = ",") -> pa.Table:
    # Only an empty field is empty. Arrow takes NA, null and nan for empty too, which are names of classes.
    options = pa.csv.ConvertOptions(
        column_types={"uri": pa.string(), "label": pa.string()},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return pa.csv.read_csv(
        pa.BufferReader(content),
        read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter),
        convert_options=options,
    )


def _read_tsv(content: bytes) -> pa.Table:
    return _read_csv(content, delimiter="\t")


def _read_jsonl(content: bytes) -> pa.Table:
    """Read JSON lines, whose labels are all text or all whole numbers.

    A key that no line has becomes a column of nulls, which the caller refuses.
    """
    try:
        return _read_json_as(content, pa.string())
    except pa.ArrowInvalid:
        try:
            return _read_json_as(content, pa.int64())
        except pa.ArrowInvalid:
            pass
        raise


def _read_json_as(content: bytes, label_type: pa.DataType) -> pa.Table:
    schema = pa.schema([("uri", pa.string()), ("label", label_type)])
    return pa.json.read_json(
        pa.BufferReader(content),
        read_options=pa.json.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _read_parquet(content: bytes) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(content))
    names = file.schema_arrow.names
    # Other columns may hold the images themselves; one name twice is refused by the caller.
    wanted = [name for name in LABELLED_SCHEMA.names if names.count(name) == 1]
    return file.read(wanted) if len(wanted) == len(LABELLED_SCHEMA.names) else file.schema_arrow.empty_table()


READERS: dict[str, Callable[[bytes], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _refuse_empty(location: str, table: pa.Table) -> None:
    for name in LABELLED_SCHEMA.names:
        empty = [row for row, value in enumerate(table[name].to_pylist(), 1) if not value]
        if empty:
            raise RequestError(
                f"{location} has rows without uri or label: row {empty[0]} has no {name} (rows like it: {len(empty)})"
            )


def _resolve(location: str, entries: list[str], trust_list: bool) -> list[str]:
    is_trusted = trust_list or uris.is_local(location)
    folder = posixpath.dirname(re.split(r"[?#]", location, maxsplit=1)[0] if "?" in location else location)
    resolved: list[str] = []
    first_row_of: dict[str, int] = {}
    for row, entry in enumerate(entries, 1):
        try:
            uri = _resolve_entry(folder, entry)
            host = None if is_trusted else _host_of(uri)
        except ValueError as error:  # also RequestError
            raise RequestError(f"row {row} of {location}: {error}") from None
        if host is not None:
            first_row_of.setdefault(host, row)
        resolved.append(uri)
    if not is_trusted:
        _refuse_private(location, first_row_of)
    return resolved


def _resolve_entry(folder: str, entry: str) -> str:
    """Return the normalized URI of an entry; relative ones lie in `folder`.

    Raises:
        ValueError: the entry holds a secret or cannot be a place.
    """
    if "://" in entry:
        return uris.normalize(check_uri(entry))
    if entry.startswith(("/", "file:/")):
        return uris.normalize(entry)
    if entry == "~" or entry.startswith("~/"):
        return uris.normalize(expand_home(entry))
    uri = uris.join(folder, entry)
    refuse_secrets(uri)
    return uris.normalize(uri)


def _host_of(uri: str) -> str | None:
    """Return the host that fetching a URI connects to; None for object stores and `""` for files of this machine."""
    if uris.is_local(uri):
        return ""
    if uris.protocol_of(uri) in OBJECT_STORES:
        return None
    return urlsplit(uri).hostname or ""


def _refuse_private(location: str, first_row_of: dict[str, int]) -> None:
    """Refuse hosts of a private network, other than the one that the list itself came from."""
    own = None if uris.protocol_of(location) in OBJECT_STORES else urlsplit(location).hostname
    private = private_hosts({host for host in first_row_of if host not in ("", own)})
    for host, row in first_row_of.items():
        if host == "" or host in private:
            what = f"the host {host!r} of a private network" if host else "a file of this machine"
            raise RequestError(
                f"row {row} of {location} names {what}, but the list lies elsewhere; if you trust it, set trust_list "
                "beside its uri"
            )
