"""Reader of zip files, as a user of this project would write it. It is the example of the page "Extend it"."""

import io
import zipfile
from collections.abc import Iterator

import pyarrow as pa

from pipelines.errors import ItemError
from pipelines.inputs.reader import Listing, ListRequest
from pipelines.storage.bulk import Fetched, read_object


class ZipReader:
    """Reader for which each file in a zip archive is an input. Comments of files are carried to the output."""

    name = "zip"
    locators = ("archive", "member")

    def matches(self, uri: str) -> bool:
        """Return True if a URI ends in `.zip`."""
        return uri.lower().endswith(".zip")

    def list(self, request: ListRequest) -> Listing:
        """List the files in the archive."""
        with zipfile.ZipFile(io.BytesIO(read_object(request.uri))) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        names = [member.filename for member in members]
        columns = {
            "uri": [f"{request.uri}#{name}" for name in names],
            "size_bytes": pa.array([member.file_size for member in members], pa.int64()),
            "etag": [""] * len(members),
            "archive": [request.uri] * len(members),
            "member": names,
            "comment": [member.comment.decode() for member in members],
        }
        if request.with_labels:
            columns["label"] = [name.partition("/")[0] for name in names]
        return Listing(pa.table(columns), num_excluded=0)

    def read(self, rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
        """Read files, and yield an error for each damaged one."""
        places = rows.select(["archive", "member"]).to_pylist()
        archives = {
            uri: zipfile.ZipFile(io.BytesIO(read_object(uri))) for uri in {place["archive"] for place in places}
        }
        for position, place in enumerate(places):
            try:
                content: bytes | ItemError = archives[place["archive"]].read(place["member"])
            except zipfile.BadZipFile as error:
                content = ItemError("corrupt", str(error))
            yield Fetched(position, content, num_retries=0)
