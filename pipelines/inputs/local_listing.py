"""Listing of a local folder that lists each file once and tolerates changes while it runs."""

import logging
import os
import stat
from collections.abc import Callable, Iterator

from pipelines.storage.filesystem import etag_of_file
from pipelines.storage.uris import as_text

log = logging.getLogger(__name__)

Entry = tuple[str, int, str]
"""URI, size in bytes, etag."""

# Number of names that a warning spells out.
MAX_NAMED = 3


class LocalLister:
    """Recursive lister of one local folder.

    Real folders are listed first. A link to a folder is followed only if its target is not listed anyway, so that no
    link displaces a folder or lists a file twice. Files that vanish during the listing are left out.

    Entries that cannot be read are listed too, with size 0 and no etag, so that they are counted as failed when they
    are fetched: folders without permission, dangling and circular links, FIFOs, sockets and devices (none of which is
    opened). Names that are not UTF-8 are listed escaped, because Arrow strings cannot hold them, and fail likewise.

    Args:
        root: Absolute path of the folder.
        is_excluded: Callable that returns True if a path below `root` matches an exclude pattern.

    Attributes:
        followed: Real paths of folders outside `root`, by the link that leads to each.
    """

    def __init__(self, root: str, is_excluded: Callable[[str], bool]) -> None:
        self._root = root
        self._is_excluded = is_excluded
        self._listed: set[str] = set()  # real paths of folders
        self._links: list[str] = []
        self.followed: dict[str, str] = {}
        self._skipped_links: list[str] = []
        self._unreadable: list[str] = []
        self._escaped: list[str] = []

    def entries(self) -> Iterator[Entry]:
        """Yield every file, then log warnings about skipped links and unreadable entries.

        Raises:
            OSError: The root cannot be read.
        """
        real_root = os.path.realpath(self._root)
        yield from self._walk(self._root, real_root)
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                target = os.path.realpath(link)
                is_circular = f"{real_root}/".startswith(f"{target.rstrip('/')}/")
                if is_circular or target in self._listed:
                    self._skipped_links.append(f"{self._below(link)} -> {os.path.relpath(target, real_root)}")
                else:
                    self.followed[as_text(link)] = as_text(target)
                    yield from self._walk(link, target)
        self._log_warnings()

    def _walk(self, path: str, real_path: str) -> Iterator[Entry]:
        """Yield the files below a folder.

        Args:
            path: Path of the folder, from which the names of the files are made.
            real_path: The same path with links resolved.
        """
        pending = [(path, real_path)]
        while pending:
            folder, real_folder = pending.pop()
            if real_folder in self._listed:
                continue
            self._listed.add(real_folder)
            try:
                with os.scandir(folder) as children:
                    for child in children:
                        if child.is_dir(follow_symlinks=False):
                            pending.append((child.path, f"{real_folder.rstrip('/')}/{child.name}"))
                        elif (entry := self._entry_of(child)) is not None:
                            yield entry
            except OSError as error:
                if folder == self._root:
                    raise
                if not isinstance(error, FileNotFoundError | NotADirectoryError):
                    yield from self._unreadable_folder(folder)

    def _entry_of(self, child: "os.DirEntry[str]") -> Entry | None:
        """Return the entry of a child that is not a folder, or None if it links to a folder or has vanished."""
        try:
            if child.is_symlink() and child.is_dir():
                self._links.append(child.path)
                return None
            found = child.stat()
        except FileNotFoundError:
            if not child.is_symlink():
                return None
            found = None
        except OSError:  # a circular link, or a folder that may be listed but not entered
            found = None
        return self._entry(child.path, found)

    def _unreadable_folder(self, folder: str) -> Iterator[Entry]:
        if not self._is_excluded(f"{self._below(folder)}/"):
            self._unreadable.append(self._below(folder))
            yield self._entry(folder, None)

    def _entry(self, path: str, found: os.stat_result | None) -> Entry:
        text = as_text(path)
        if text is not path and not self._is_excluded(self._below(path)):
            self._escaped.append(self._below(path))
        return entry_of(text, found)

    def _below(self, path: str) -> str:
        return as_text(path).removeprefix(as_text(self._root)).lstrip("/")

    def _log_warnings(self) -> None:
        for names, warning in (
            (self._skipped_links, "links not followed, because they point to folders that are listed anyway"),
            (self._unreadable, "folders that cannot be read, each counted as one failed input"),
            (self._escaped, "file names that are not UTF-8, each counted as one failed input until it is renamed"),
        ):
            if names:
                quoted = ", ".join(map(repr, sorted(names)[:MAX_NAMED])) + (", ..." if len(names) > MAX_NAMED else "")
                log.warning("%s: %s: %d (%s)", self._root, warning, len(names), quoted)


def entry_of(path: str, found: os.stat_result | None) -> Entry:
    """Return the entry of a path, with size 0 and no etag unless it is known to be a regular file."""
    if found is None or not stat.S_ISREG(found.st_mode):
        return path, 0, ""
    return path, found.st_size, etag_of_file(found)
