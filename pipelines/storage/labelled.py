"""Labelled images: folders named for their class, or a list of URIs and labels; pinned under the output.

A set's images have ids, dense from 0, by their place in the pinned table.
"""

import difflib
import io
import posixpath
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.filesystem import in_plain_words, is_there, read_bytes, write_bytes
from pipelines.storage.listing import list_objects

LABELLED_SCHEMA = pa.schema([("uri", pa.string()), ("label", pa.string())])
LIST_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class LabelledImages:
    """A set of labelled images.

    Attributes:
        table: `LABELLED_SCHEMA`; an image's id is its row.
        num_excluded: objects left out by a pattern.
    """

    table: pa.Table
    num_excluded: int

    def class_names(self) -> list[str]:
        """The labels that occur, sorted."""
        return sorted(pc.unique(self.table["label"]).to_pylist())

    def targets(self, class_names: list[str]) -> NDArray[np.int64]:
        """The index of each image's label in `class_names`: by name, whatever the order of either.

        Raises:
            RequestError: a label that `class_names` lacks.
        """
        found = pc.index_in(self.table["label"].combine_chunks(), pa.array(class_names, pa.string()))
        if found.null_count:
            unknown = sorted(set(self.class_names()) - set(class_names))
            near = difflib.get_close_matches(unknown[0], class_names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            more = f", {', '.join(map(repr, unknown[1:4]))}" if unknown[1:] else ""
            raise RequestError(
                f"{len(unknown)} of the images' classes are not among the model's {len(class_names)}: "
                f"{unknown[0]!r}{hint}{more}"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def read_labelled(uri: str, exclude: list[str]) -> LabelledImages:
    """List a set.

    Args:
        uri: a folder or prefix whose folders are named for the classes (`cat/1.jpg`, `dog/a/2.png`), or a `.csv` or
            `.parquet` file with the columns `uri` and `label`. URIs in a list that are neither absolute nor of a
            protocol are taken from the list's own folder.
        exclude: shell patterns on the path below a folder; not used on lists.

    Raises:
        RequestError: nothing is there, or it is not labelled.
    """
    location = uris.normalize(uri)
    if not is_there(location):
        raise RequestError(f"no input: nothing lies under {location}")
    if location.endswith(LIST_SUFFIXES):
        return LabelledImages(_read_list(location), 0)
    listing = list_objects(location, exclude)
    folder = location.rstrip("/") + "/"
    object_uris = listing.table["uri"].to_pylist()
    below = [object_uri.removeprefix(folder) for object_uri in object_uris]
    unlabelled = next((path for path in below if "/" not in path), None)
    if unlabelled is not None:
        raise RequestError(f"{location} holds {unlabelled} outside any folder: folders are named for their class")
    labels = [path.partition("/")[0] for path in below]
    return LabelledImages(pa.table([object_uris, labels], schema=LABELLED_SCHEMA), listing.num_excluded)


def _read_list(location: str) -> pa.Table:
    with in_plain_words("read the list", location):
        content = pa.BufferReader(read_bytes(location))
    as_text = pa.csv.ConvertOptions(column_types={"uri": pa.string(), "label": pa.string()}, strings_can_be_null=True)
    try:
        is_csv = location.endswith(".csv")
        table = pa.csv.read_csv(content, convert_options=as_text) if is_csv else pq.read_table(content)
    except pa.ArrowInvalid as error:
        raise RequestError(f"{location} cannot be read: {' '.join(str(error).split())}") from None
    missing = [name for name in LABELLED_SCHEMA.names if name not in table.column_names]
    if missing:
        raise RequestError(f"{location} has no column {' or '.join(missing)}; it has: {', '.join(table.column_names)}")
    table = table.select(LABELLED_SCHEMA.names)
    try:
        table = table.cast(LABELLED_SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RequestError(f"{location}: uri and label are to be text or numbers: {error}") from None
    if not table.num_rows:
        raise RequestError(f"no input: {location} lists no image")
    if any(column.null_count for column in table.columns):
        raise RequestError(f"{location} has rows without uri or label")
    folder = posixpath.dirname(location)
    resolved = [_beside(folder, object_uri) for object_uri in table["uri"].to_pylist()]
    return table.set_column(0, "uri", pa.array(resolved, pa.string()))


def _beside(folder: str, object_uri: str) -> str:
    is_complete = "://" in object_uri or object_uri.startswith("/")
    return object_uri if is_complete else uris.join(folder, object_uri)


def pin(output_uri: str, name: str, images: LabelledImages) -> None:
    """Write a set under an output, so that ids mean the same images for as long as the output lives."""
    buffer = io.BytesIO()
    metadata = {"num_excluded": str(images.num_excluded)}
    pq.write_table(images.table.replace_schema_metadata(metadata), buffer, compression="zstd")
    write_bytes(_pinned_uri(output_uri, name), buffer.getvalue())


def find_pinned(output_uri: str, name: str) -> LabelledImages | None:
    """The set that an earlier run pinned; None where there is none."""
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(_pinned_uri(output_uri, name))))
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid:
        raise RequestError(f"{_pinned_uri(output_uri, name)} is damaged: it is not what a job wrote there") from None
    return LabelledImages(table, int(table.schema.metadata[b"num_excluded"]))


def _pinned_uri(output_uri: str, name: str) -> str:
    return uris.join(output_uri, f"_data/{name}.parquet")
