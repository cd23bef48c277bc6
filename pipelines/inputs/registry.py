"""Registry of readers. To add a form of input, add a module with its reader, and a line here."""

from pipelines.errors import RequestError
from pipelines.inputs.files import FilesReader
from pipelines.inputs.lists import ListReader
from pipelines.inputs.reader import Reader

# In order of precedence. The last reader accepts every URI.
_READERS: list[Reader] = [ListReader(), FilesReader()]


def register(reader: Reader) -> None:
    """Register a reader, with precedence over the others.

    Args:
        reader: Reader from a module that workers can import too.
    """
    _READERS.insert(0, reader)


def choose_reader(uri: str) -> Reader:
    """Return the reader for a normalized URI."""
    return next(reader for reader in _READERS if reader.matches(uri))


def reader_named(name: str) -> Reader:
    """Return the reader of that name, as recorded in a manifest.

    Raises:
        RequestError: There is no such reader.
    """
    for reader in _READERS:
        if reader.name == name:
            return reader
    known = ", ".join(sorted(reader.name for reader in _READERS))
    raise RequestError(f"the inputs were listed by the reader {name!r}, but this version of ecaray has only: {known}")
