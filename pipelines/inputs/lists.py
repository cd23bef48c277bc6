"""Reader of lists: CSV, TSV, JSON lines and Parquet files with a column `uri` and, for labelled sets, `label`."""

import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipelines.config.uri import check_uri, expand_home, refuse_secrets
from pipelines.errors import RequestError
from pipelines.inputs.hosts import private_hosts
from pipelines.inputs.reader import Listing, ListRequest, read_objects
from pipelines.storage import uris
from pipelines.storage.bulk import Fetched
from pipelines.storage.filesystem import read_bytes, translate_storage_errors

log = logging.getLogger(__name__)

# Arrow requires each line to fit into a block. Its default of 1 MiB is too small for lists with long lines.
BLOCK_BYTES = 16 * 1024**2
# Protocols whose URIs name a bucket of a public service rather than a host.
OBJECT_STORES = ("abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "oss", "s3", "wasb", "wasbs")


def list_suffix(location: str) -> str | None:
    """Return the lower-case suffix of a location if it is the suffix of a list, else None."""
    path = re.split(r"[?#]", location, maxsplit=1)[0] if uris.protocol_of(location) in ("http", "https") else location
    suffix = posixpath.splitext(path)[1].lower()
    return suffix if suffix in PARSERS else None


class ListReader:
    """Reader of lists whose rows name objects. The rows keep the order of the list."""

    name = "list"
    locators = ()

    def matches(self, uri: str) -> bool:
        """Return whether a URI has the suffix of a list."""
        return list_suffix(uri) is not None

    def list(self, request: ListRequest) -> Listing:
        """Read the list.

        Raises:
            RequestError: The file is not a list, or one of its rows is invalid.
        """
        if request.exclude:
            log.warning("exclude has no effect on a list: %s", request.uri)
        columns = ["uri", "label"] if request.with_labels else ["uri"]
        table = read_list(request.uri, columns, trust_list=request.trust_list)
        sizes, etags = pa.nulls(table.num_rows, pa.int64()), pa.array([""] * table.num_rows, pa.string())
        return Listing(table.add_column(1, "size_bytes", sizes).add_column(2, "etag", etags), 0)

    def read(self, rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
        """Read the object of each row."""
        return read_objects(rows, max_bytes)


def read_list(location: str, columns: list[str], *, trust_list: bool) -> pa.Table:
    """Read columns of a list.

    Args:
        location: Normalized URI for which `list_suffix` is not None. Entries without a protocol or a leading slash are
            relative to its folder.
        columns: Names of the columns, `uri` first.
        trust_list: True to let a list from elsewhere name files on this machine and hosts in its network.

    Returns:
        The columns as strings, with every URI normalized.

    Raises:
        RequestError: The file is not a list, or one of its rows is invalid.
    """
    suffix = list_suffix(location)
    assert suffix is not None
    with translate_storage_errors("read the list", location):
        content = read_bytes(location)
    try:
        table = PARSERS[suffix](content, columns)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{location} cannot be read: {' '.join(str(error).split())}") from None
    repeated = next((name for name in columns if table.column_names.count(name) > 1), None)
    if repeated:
        raise RequestError(f"{location} has more than one column {repeated!r}: remove all but one")
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise RequestError(f"{location} has no column {' or '.join(missing)}; it has: {', '.join(table.column_names)}")
    try:
        table = table.select(columns).cast(pa.schema([(name, pa.string()) for name in columns]))
    except pa.ArrowException as error:
        raise RequestError(f"{location}: {' and '.join(columns)} must be text or numbers: {error}") from None
    if not table.num_rows:
        raise RequestError(f"no input: the list {location} has no rows")
    _refuse_empty(location, table)
    resolved = _resolve(location, table["uri"].to_pylist(), trust_list)
    return table.set_column(0, "uri", pa.array(resolved, pa.string()))


def _read_csv(content: bytes, columns: list[str], delimiter: str = ",") -> pa.Table:
    # By default, Arrow also reads NA, null and nan as nulls, but they can be class names. Only an empty field is null.
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
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


def _read_tsv(content: bytes, columns: list[str]) -> pa.Table:
    return _read_csv(content, columns, delimiter="\t")


def _read_jsonl(content: bytes, columns: list[str]) -> pa.Table:
    """Read JSON lines, whose labels are either all strings or all integers.

    A key that no line has becomes a column of nulls, which the caller refuses.
    """
    try:
        return _read_json_as(content, columns, pa.string())
    except pa.ArrowInvalid:
        try:
            return _read_json_as(content, columns, pa.int64())
        except pa.ArrowInvalid:
            pass
        raise


def _read_json_as(content: bytes, columns: list[str], label_type: pa.DataType) -> pa.Table:
    schema = pa.schema([(name, label_type if name == "label" else pa.string()) for name in columns])
    return pa.json.read_json(
        pa.BufferReader(content),
        read_options=pa.json.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _read_parquet(content: bytes, columns: list[str]) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(content))
    names = file.schema_arrow.names
    # Do not read other columns, which may hold the images themselves. The caller refuses duplicate names.
    wanted = [name for name in columns if names.count(name) == 1]
    return file.read(wanted) if len(wanted) == len(columns) else file.schema_arrow.empty_table()


PARSERS: dict[str, Callable[[bytes, list[str]], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _refuse_empty(location: str, table: pa.Table) -> None:
    for name in table.column_names:
        empty = [row for row, value in enumerate(table[name].to_pylist(), 1) if not value]
        if empty:
            raise RequestError(
                f"{location}: row {empty[0]} has no {name} (rows without one: {len(empty)}); add it, or remove the rows"
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
    """Return the normalized URI of an entry. Relative entries are resolved against `folder`.

    Raises:
        ValueError: The entry contains a secret or is not a valid URI.
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
    """Return the host that serves a URI, None for object stores, or `""` for files on this machine."""
    if uris.is_local(uri):
        return ""
    if uris.protocol_of(uri) in OBJECT_STORES:
        return None
    return urlsplit(uri).hostname or ""


def _refuse_private(location: str, first_row_of: dict[str, int]) -> None:
    """Refuse local files and hosts in a private network, except the host that the list itself came from."""
    own = None if uris.protocol_of(location) in OBJECT_STORES else urlsplit(location).hostname
    private = private_hosts({host for host in first_row_of if host not in ("", own)})
    for host, row in first_row_of.items():
        if host == "" or host in private:
            what = f"the host {host!r} in a private network" if host else "a file on this machine"
            raise RequestError(
                f"row {row} of {location} names {what}, but the list comes from elsewhere: if you trust the list, set "
                "trust_list next to its uri"
            )
