"""Files that take long to make and that any process of this user on this machine can use again."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# The ones used last stay; most are as large as a model.
MAX_FILES = 8
LONGEST_MAKING_S = 86_400.0


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
                with (Path(aside) / name).open("rb") as file:
                    os.fsync(file)  # or a machine that fails may leave an empty one
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
    """Files beyond the limit, and what processes that died while they made one left."""
    used_at: dict[Path, float] = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process drops the same
            if path.is_dir() and path.stat().st_mtime < time.time() - LONGEST_MAKING_S:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and path.suffix != ".lock":
                used_at[path] = path.stat().st_mtime
    for path in sorted(used_at, key=lambda path: used_at[path], reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)
