"""Reader of individual objects: everything under a folder or prefix, or one object."""

from collections.abc import Iterator

import pyarrow as pa

from pipelines.errors import RequestError
from pipelines.inputs.class_folders import label_by_folder, log_empty_folders
from pipelines.inputs.listing import list_objects
from pipelines.inputs.lists import PARSERS
from pipelines.inputs.reader import Listing, ListRequest, read_objects
from pipelines.storage import uris
from pipelines.storage.bulk import Fetched


class FilesReader:
    """Reader for which every object is an input, whatever its name. Labels are the names of the top-level folders."""

    name = "files"
    locators = ()

    def matches(self, uri: str) -> bool:
        """Return True: this reader takes every URI that no other reader takes."""
        return True

    def list(self, request: ListRequest) -> Listing:
        """List every object, sorted by URI.

        Raises:
            RequestError: There is nothing to read, the store fails, or the folders cannot be classes.
        """
        listing = list_objects(request.uri, request.exclude)
        return _with_labels(listing, request) if request.with_labels else listing

    def read(self, rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
        """Read the object of each row."""
        return read_objects(rows, max_bytes)


def _with_labels(listing: Listing, request: ListRequest) -> Listing:
    uri = request.uri
    if listing.table.num_rows == 1 and listing.table["uri"][0].as_py() == uri:
        raise RequestError(
            f"{uri} is a single file, neither a folder of classes nor a list: a list ends in {', '.join(PARSERS)} "
            "(uncompressed, in upper or lower case)"
        )
    is_kept, labels, num_ignored = label_by_folder(uri, listing.table["uri"])
    table = listing.table.filter(is_kept).append_column("label", pa.array(labels, pa.string()))
    if uris.is_local(uri):
        log_empty_folders(uri, request.exclude, set(labels))
    return Listing(table, listing.num_excluded + num_ignored, listing.linked)
