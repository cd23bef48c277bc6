"""Labelled images of any form of input, pinned under the output.

The id of an image is its row in the pinned table.
"""

import difflib
import io
import posixpath
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import RequestError
from pipelines.inputs.class_folders import named
from pipelines.inputs.reader import ListRequest, Reader
from pipelines.inputs.registry import choose_reader, reader_named
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, read_bytes, write_bytes


@dataclass(frozen=True)
class LabelledImages:
    """A set of labelled images.

    Attributes:
        table: `uri`, the locators of the reader, and `label`; the id of an image is its row.
        num_excluded: objects left out by a pattern, or as hidden and system files.
        reader: reads the images.
        linked: as `Listing.linked`, when the set was just listed.
    """

    table: pa.Table
    num_excluded: int
    reader: Reader
    linked: dict[str, str] = field(default_factory=dict)

    def rows(self) -> pa.Table:
        """Return `id` and the columns by which the reader finds each image."""
        rows = self.table.select(["uri", *self.reader.locators])
        return rows.add_column(0, "id", pa.array(range(rows.num_rows), pa.int64()))

    def class_names(self) -> list[str]:
        """Return the labels that occur, sorted."""
        return sorted(pc.unique(self.table["label"]).to_pylist())

    def num_shared(self, other: "LabelledImages") -> int:
        """Return how many of the images are also in `other`, by URI."""
        return int(pc.sum(pc.is_in(self.table["uri"], other.table["uri"].combine_chunks())).as_py() or 0)

    def targets(self, class_names: list[str]) -> NDArray[np.int64]:
        """Return the index of each image's label in `class_names`.

        Raises:
            RequestError: `class_names` lacks a label.
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


def read_labelled(uri: str, exclude: list[str], *, trust_list: bool = False) -> LabelledImages:
    """List a set of labelled images.

    Args:
        uri: of any form that a reader knows: a folder or prefix whose folders are named for the classes
            (`cat/1.jpg`, `dog/a/2.png`), or a list.
        exclude: shell patterns on the path below a folder.
        trust_list: whether a list that is not on this machine may name files of this machine and hosts of its network.

    Raises:
        RequestError: nothing is there, or it is not labelled.
    """
    location = uris.normalize(uri)
    if not exists(location):
        raise RequestError(f"no input: nothing lies under {location}")
    reader = choose_reader(location)
    listing = reader.list(ListRequest(location, exclude, trust_list, with_labels=True))
    table = listing.table.select(["uri", *reader.locators, "label"])
    return LabelledImages(table, listing.num_excluded, reader, listing.linked)


def refuse_one_class(images: LabelledImages, key: str) -> None:
    """Refuse to train on images of a single class, for which every loss is 0.

    Args:
        images: the training images.
        key: that names them, such as `data.train.uri`.

    Raises:
        RequestError: there is one class; says which folders in it may be meant.
    """
    names = images.class_names()
    if len(names) > 1:
        return
    object_uris = images.table["uri"].to_pylist()
    common = posixpath.commonprefix([min(object_uris), max(object_uris)]).rpartition("/")[0]
    below = [uri.removeprefix(f"{common}/") for uri in object_uris if posixpath.basename(common) == names[0]]
    folders = sorted({path.partition("/")[0] for path in below if "/" in path})
    hint = (
        f"; its folders {named(folders)} look like classes: name the folder that holds them in {key}"
        if folders
        else "; a classifier needs two or more"
    )
    raise RequestError(f"all {len(object_uris)} images of {key} are of one class, {names[0]!r}{hint}")


def pin(folder_uri: str, name: str, images: LabelledImages) -> None:
    """Write a set into a folder, so that its ids mean the same images for as long as the folder exists."""
    buffer = io.BytesIO()
    metadata = {"num_excluded": str(images.num_excluded), "reader": images.reader.name}
    pq.write_table(images.table.replace_schema_metadata(metadata), buffer, compression="zstd")
    write_bytes(uris.join(folder_uri, f"{name}.parquet"), buffer.getvalue())


def find_pinned(folder_uri: str, name: str) -> LabelledImages | None:
    """Return the set of that name that an earlier run pinned in a folder; None if there is none.

    Raises:
        RequestError: the file is damaged, or its reader is not known.
    """
    uri = uris.join(folder_uri, f"{name}.parquet")
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)))
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid:
        raise RequestError(f"{uri} is damaged: it is not what a job wrote there") from None
    metadata = table.schema.metadata
    # Before there were readers, sets of both forms were read alike.
    reader = reader_named(metadata.get(b"reader", b"files").decode())
    return LabelledImages(table, int(metadata[b"num_excluded"]), reader)
