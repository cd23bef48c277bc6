"""Reader of zip files, as a user of this project would write it. It is the example of the page "Extend it"."""

import contextlib
import fnmatch
import zipfile
from collections.abc import Iterator

import pyarrow as pa

from pipelines.errors import ItemError
from pipelines.inputs.reader import Listing, ListRequest
from pipelines.storage.bounded import refuse_large
from pipelines.storage.bulk import Fetched, item_error, open_seekable
from pipelines.storage.filesystem import translate_storage_errors


class ZipReader:
    """Reader of zip archives, each file of which is an input. The comments of the files are carried to the output."""

    name = "zip"
    locators = ("archive", "member")

    def matches(self, uri: str) -> bool:
        """Return True if a URI ends in `.zip`."""
        return uri.lower().endswith(".zip")

    def list(self, request: ListRequest) -> Listing:
        """List the files in the archive."""
        with translate_storage_errors("list", request.uri), _open_archive(request.uri) as archive:
            found = [member for member in archive.infolist() if not member.is_dir()]
        members = [member for member in found if not _matches_any(member.filename, request.exclude)]
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
        return Listing(pa.table(columns), num_excluded=len(found) - len(members))

    def read(self, rows: pa.Table, max_bytes: int) -> Iterator[Fetched]:
        """Read the files of one archive after the other."""
        archives, members = rows["archive"].to_pylist(), rows["member"].to_pylist()
        for uri in dict.fromkeys(archives):
            wanted = {position: members[position] for position, other in enumerate(archives) if other == uri}
            try:
                with _open_archive(uri) as archive:
                    for position in list(wanted):
                        yield Fetched(position, _read_member(archive, wanted[position], max_bytes), num_retries=0)
                        del wanted[position]
            except Exception as error:  # the store fails, or the archive is gone or damaged
                for position in wanted:
                    yield Fetched(position, item_error(error, uri), num_retries=0)


@contextlib.contextmanager
def _open_archive(uri: str) -> Iterator[zipfile.ZipFile]:
    with open_seekable(uri) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes | ItemError:
    try:
        refuse_large(archive.getinfo(name).file_size, max_bytes)
        return archive.read(name) or ItemError("empty", "the file is empty")
    except (ItemError, zipfile.BadZipFile) as error:
        return error if isinstance(error, ItemError) else ItemError("corrupt", str(error))


def _matches_any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
