"""Sets of labelled images from any input form, pinned under the output.

The id of an image is its row number in the pinned table.
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
from pipelines.inputs.class_folders import quote_names
from pipelines.inputs.reader import ListRequest, Reader
from pipelines.inputs.registry import choose_reader, reader_named
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, read_bytes, write_bytes


@dataclass(frozen=True)
class LabelledImages:
    """Set of labelled images.

    Attributes:
        table: Columns `uri`, the locators of the reader, and `label`. The id of an image is its row number.
        num_excluded: Number of objects that matched an exclude pattern or are hidden or system files.
        reader: Reader of the images.
        linked: `Listing.linked` if the set was just listed; empty if it was read from a pinned table.
    """

    table: pa.Table
    num_excluded: int
    reader: Reader
    linked: dict[str, str] = field(default_factory=dict)

    def rows(self) -> pa.Table:
        """Return `id` and the columns from which the reader locates each image."""
        rows = self.table.select(["uri", *self.reader.locators])
        return rows.add_column(0, "id", pa.array(range(rows.num_rows), pa.int64()))

    def class_names(self) -> list[str]:
        """Return the distinct labels, sorted."""
        return sorted(pc.unique(self.table["label"]).to_pylist())

    def num_shared(self, other: "LabelledImages") -> int:
        """Return the number of images that are also in `other`, by URI."""
        return int(pc.sum(pc.is_in(self.table["uri"], other.table["uri"].combine_chunks())).as_py() or 0)

    def targets(self, class_names: list[str]) -> NDArray[np.int64]:
        """Return the index of each image's label in `class_names`, shape `(num_images,)`.

        Raises:
            RequestError: A label is not in `class_names`.
        """
        found = pc.index_in(self.table["label"].combine_chunks(), pa.array(class_names, pa.string()))
        if found.null_count:
            unknown = sorted(set(self.class_names()) - set(class_names))
            near = difflib.get_close_matches(unknown[0], class_names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            more = f", {', '.join(map(repr, unknown[1:4]))}" if unknown[1:] else ""
            raise RequestError(
                f"{len(unknown)} classes of the images are not among the model's {len(class_names)} classes: "
                f"{unknown[0]!r}{hint}{more}"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def read_labelled(uri: str, exclude: list[str], *, trust_list: bool = False) -> LabelledImages:
    """List a set of labelled images.

    Args:
        uri: URI in any form that a reader knows: a folder or prefix with one folder per class (`cat/1.jpg`,
            `dog/a/2.png`), or a list.
        exclude: Shell patterns on the path below a folder.
        trust_list: True to let a list from elsewhere name files on this machine and hosts in its network.

    Raises:
        RequestError: There are no images, or they have no labels.
    """
    location = uris.normalize(uri)
    if not exists(location):
        raise RequestError(f"no input: nothing found under {location}")
    reader = choose_reader(location)
    listing = reader.list(ListRequest(location, exclude, trust_list, with_labels=True))
    table = listing.table.select(["uri", *reader.locators, "label"])
    return LabelledImages(table, listing.num_excluded, reader, listing.linked)


def refuse_one_class(images: LabelledImages, key: str) -> None:
    """Refuse to train on images of a single class, for which every loss is 0.

    Args:
        images: Training images.
        key: Config key of their URI, such as `data.train.uri`.

    Raises:
        RequestError: There is only one class. The message names folders in it that may be the intended classes.
    """
    names = images.class_names()
    if len(names) > 1:
        return
    object_uris = images.table["uri"].to_pylist()
    common = posixpath.commonprefix([min(object_uris), max(object_uris)]).rpartition("/")[0]
    below = [uri.removeprefix(f"{common}/") for uri in object_uris if posixpath.basename(common) == names[0]]
    folders = sorted({path.partition("/")[0] for path in below if "/" in path})
    hint = (
        f"; its folders {quote_names(folders)} look like classes: set {key} to the folder that contains them"
        if folders
        else "; a classifier needs at least two"
    )
    raise RequestError(f"all {len(object_uris)} images of {key} belong to one class, {names[0]!r}{hint}")


def pin(folder_uri: str, name: str, images: LabelledImages) -> None:
    """Write a set to a folder, so that later runs use the same ids for the same images."""
    buffer = io.BytesIO()
    metadata = {"num_excluded": str(images.num_excluded), "reader": images.reader.name}
    pq.write_table(images.table.replace_schema_metadata(metadata), buffer, compression="zstd")
    write_bytes(uris.join(folder_uri, f"{name}.parquet"), buffer.getvalue())


def find_pinned(folder_uri: str, name: str) -> LabelledImages | None:
    """Return the set that an earlier run pinned in a folder under that name, or None if there is none.

    Raises:
        RequestError: The file is damaged, or its reader is unknown.
    """
    uri = uris.join(folder_uri, f"{name}.parquet")
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)))
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid:
        raise RequestError(
            f"{uri} is damaged (not a valid Parquet file): restore it from a backup, or use a new output"
        ) from None
    metadata = table.schema.metadata
    # Versions before readers existed recorded none. They read the images of folders and lists in the same way.
    reader = reader_named(metadata.get(b"reader", b"files").decode())
    return LabelledImages(table, int(metadata[b"num_excluded"]), reader)
