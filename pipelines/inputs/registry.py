"""The readers that jobs know. A new form of input is a module with its reader, and a line here."""

from pipelines.errors import RequestError
from pipelines.inputs.files import FilesReader
from pipelines.inputs.lists import ListReader
from pipelines.inputs.reader import Reader

# In the order in which they are asked; the last one takes everything.
_READERS: list[Reader] = [ListReader(), FilesReader()]


def register(reader: Reader) -> None:
    """Add a reader, to be asked before the others.

    Args:
        reader: of a module that the workers can import too.
    """
    _READERS.insert(0, reader)


def choose_reader(uri: str) -> Reader:
    """Return the reader for a normalized URI."""
    return next(reader for reader in _READERS if reader.matches(uri))


def reader_named(name: str) -> Reader:
    """Return the reader that a manifest refers to.

    Raises:
        RequestError: there is none of that name.
    """
    for reader in _READERS:
        if reader.name == name:
            return reader
    known = ", ".join(sorted(reader.name for reader in _READERS))
    raise RequestError(f"the inputs were listed by a reader called {name!r}, and this version has: {known}")
