"""Cache of files that are slow to build, shared by all processes of this user on this machine.

Some of these files are code that is loaded into the process. If another user could write to the folder, they could run
code as this user. The folder is therefore subject to the same checks as a home folder under `StrictModes` of
sshd_config(5).
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

# The least recently used files beyond this limit are removed. Most files are as large as a model.
MAX_FILES = 8
MAX_BUILD_TIME_S = 86_400.0
COMPILER_FOLDER = "inductor"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of a cached file, and build it first if it is missing.

    Concurrent calls in several processes build the file once.

    Args:
        name: Name of the file. It must identify everything that determines the content.
        make: Function that writes the file to the path it receives.

    Raises:
        OSError: No folder is available that only this user can write to.
    """
    folder = private_folder()
    path = folder / name
    with _locked(folder / f"{name}.lock"):
        if reason := _untrusted_reason(path):
            log.warning("rebuilding %s, because the cached file cannot be trusted: %s", path, reason)
            path.unlink()
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as build_folder:
                make(Path(build_folder) / name)
                with (Path(build_folder) / name).open("rb") as file:
                    os.fsync(file.fileno())  # a crash of the machine could otherwise leave an empty file
                (Path(build_folder) / name).chmod(0o600)
                (Path(build_folder) / name).replace(path)
        os.utime(path)
    _evict(folder)
    return path


def private_folder() -> Path:
    """Return the cache folder, and create it if it is missing.

    If other users can write to the folder in `XDG_CACHE_HOME` or HOME, a folder in the temporary directory replaces it.

    Raises:
        OSError: Neither folder can be created, or other users can write to both.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecaray"
    try:
        return _create_private_folder(chosen)
    except UntrustedError as error:
        fallback = Path(tempfile.gettempdir()) / f"ecaray-{os.geteuid()}"
        _warn_once(f"caching compiled code in {fallback}: {error}")
        return _create_private_folder(fallback)


def use_private_compiler_cache() -> None:
    """Store the compiled code of torch in this cache, unless `TORCHINDUCTOR_CACHE_DIR` is set.

    The default is a folder in /tmp with a predictable name, which another user may have created.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            folder = private_folder() / COMPILER_FOLDER
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="ecaray-"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


class UntrustedError(PermissionError):
    """Raised when another user can write to a folder from which this user would load code."""


def _create_private_folder(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.parent.resolve() / folder.name  # check and use the targets of symbolic links
    for parent in folder.parents:
        if reason := _unsafe_parent_reason(parent):
            raise UntrustedError(f"{folder} cannot be trusted: {reason}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if reason := _untrusted_reason(folder):
        raise UntrustedError(f"{folder} cannot be trusted: {reason}")
    return folder


def _unsafe_parent_reason(parent: Path) -> str | None:
    """Return the reason why another user could replace a folder below `parent`, or None if nobody can."""
    found = parent.stat()
    if found.st_uid not in (0, os.geteuid()):
        return f"{parent} belongs to user {found.st_uid}"
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        return f"all users can write to {parent}"
    return None


def _untrusted_reason(path: Path) -> str | None:
    """Return the reason why another user may have created or changed a file or folder, or None if nobody can have.

    The result is also None if the path does not exist.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a symbolic link"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to {path}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _evict(folder: Path) -> None:
    """Remove the least recently used files beyond `MAX_FILES`, and build folders of processes that died."""
    used_at: dict[Path, float] = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removed it first
            if path.name == COMPILER_FOLDER:
                continue
            if path.is_dir() and path.stat().st_mtime < time.time() - MAX_BUILD_TIME_S:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and path.suffix != ".lock":
                used_at[path] = path.stat().st_mtime
    for path in sorted(used_at, key=lambda path: used_at[path], reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)
