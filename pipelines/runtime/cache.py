"""Files that take long to make and that any process of this user on this machine can use again.

Some are code that is loaded into the process. So the folder has to be this user's own, as the home folder has to be for
ssh (StrictModes of sshd_config(5)): whoever else can write to it could have this user run their code.
"""

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

# The ones used last stay; most are as large as a model.
MAX_FILES = 8
LONGEST_MAKING_S = 86_400.0
COMPILER_FOLDER = "inductor"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the file that `make` writes, made once however many processes ask for it at the same time.

    Args:
        name: of the file; says all that the content follows from.
        make: writes the file to the path it is given.

    Raises:
        OSError: there is no folder for it that only this user can write to.
    """
    folder = private_folder()
    path = folder / name
    with _locked(folder / f"{name}.lock"):
        if reason := _why_not_ours(path):
            log.warning("making %s anew: %s", path, reason)
            path.unlink()
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                make(Path(aside) / name)
                with (Path(aside) / name).open("rb") as file:
                    os.fsync(file.fileno())  # or a machine that fails may leave an empty one
                (Path(aside) / name).chmod(0o600)
                (Path(aside) / name).replace(path)
        os.utime(path)
    _drop_oldest(folder)
    return path


def private_folder() -> Path:
    """Return the folder of the cache, made where it is missing; another one where somebody else can write to it.

    Raises:
        OSError: neither can be had.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecaray"
    try:
        return _make_private(chosen)
    except UntrustedError as error:
        fallback = Path(tempfile.gettempdir()) / f"ecaray-{os.geteuid()}"
        _warn_once(f"the cache of compiled code goes to {fallback}: {error}")
        return _make_private(fallback)


def use_private_compiler_cache() -> None:
    """Have torch's compiler keep its code in this cache, not in one of /tmp that anybody may have made."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            folder = private_folder() / COMPILER_FOLDER
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="ecaray-"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


class UntrustedError(PermissionError):
    """Somebody else can write to a folder whose code this user would run."""


def _make_private(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.parent.resolve() / folder.name  # what links lead to is looked at, and used
    for parent in folder.parents:
        if reason := _why_not_safe(parent):
            raise UntrustedError(f"{folder} is not used: {reason}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if reason := _why_not_ours(folder):
        raise UntrustedError(f"{folder} is not used: {reason}")
    return folder


def _why_not_safe(parent: Path) -> str | None:
    """Say how somebody else could put another folder in place of one below `parent`."""
    found = parent.stat()
    if found.st_uid not in (0, os.geteuid()):
        return f"{parent} belongs to user {found.st_uid}"
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        return f"everybody can write to {parent}"
    return None


def _why_not_ours(path: Path) -> str | None:
    """Say what makes a folder or file one that somebody else can write, or has made; None where it is not there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {path}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _drop_oldest(folder: Path) -> None:
    """Remove files beyond the limit, and what processes left that died while they made one."""
    used_at: dict[Path, float] = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process drops the same
            if path.name == COMPILER_FOLDER:
                continue
            if path.is_dir() and path.stat().st_mtime < time.time() - LONGEST_MAKING_S:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and path.suffix != ".lock":
                used_at[path] = path.stat().st_mtime
    for path in sorted(used_at, key=lambda path: used_at[path], reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)
