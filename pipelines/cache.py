"""Files that take long to make and that any process of this user on this machine can use again."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# The ones used last stay; each is as large as a model.
MAX_FILES = 8


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes, made once however many processes ask for it at the same time.

    Args:
        name: of the file; says all that the content follows from.
        make: writes the file to the path it is given.
    """
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    with _locked(folder / f"{name}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                make(Path(aside) / name)
                (Path(aside) / name).replace(path)
        os.utime(path)
    _drop_oldest(folder)
    return path


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecaray"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _drop_oldest(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)
