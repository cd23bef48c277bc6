"""Everything below a folder of this machine: each file once, under the name that is its own, also while it changes."""

import logging
import os
import stat
from collections.abc import Callable, Iterator

from pipelines.storage.filesystem import etag_of_file
from pipelines.storage.uris import as_text

log = logging.getLogger(__name__)

Entry = tuple[str, int, str]
"""URI, size in bytes, etag."""

# Of a note, in names; the rest is counted.
MAX_NAMED = 3


class LocalLister:
    """Lists one folder.

    Real folders are listed first. A link to a folder is followed only if its target is not listed anyway, so that no
    link displaces a folder or lists a file twice. What vanishes during the listing is left out.

    What cannot be read is listed too, without size and etag, so that its failure is counted when it is fetched: folders
    without permission, dangling and circular links, FIFOs, sockets and devices (none of which is opened). Names that
    are not UTF-8 are listed escaped, because no table can hold them, and fail likewise.

    Args:
        root: absolute path of a folder.
        is_excluded: whether a path below `root` is left out by a pattern.

    Attributes:
        followed: real path of each folder that lies elsewhere, by the link that led to it.
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
        """Yield every file, then log what a user should know about the listing.

        Raises:
            OSError: the root cannot be read.
        """
        real_root = os.path.realpath(self._root)
        yield from self._walk(self._root, real_root)
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                target = os.path.realpath(link)
                is_circle = f"{real_root}/".startswith(f"{target.rstrip('/')}/")
                if is_circle or target in self._listed:
                    self._skipped_links.append(f"{self._below(link)} -> {os.path.relpath(target, real_root)}")
                else:
                    self.followed[as_text(link)] = as_text(target)
                    yield from self._walk(link, target)
        self._log_notes()

    def _walk(self, path: str, real_path: str) -> Iterator[Entry]:
        """Yield the files below a folder, given by the path that names them and by its real path."""
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
        """Return the entry of a child that is no folder; None for a link to a folder and for what is gone."""
        try:
            if child.is_symlink() and child.is_dir():
                self._links.append(child.path)
                return None
            found = child.stat()
        except FileNotFoundError:
            if not child.is_symlink():
                return None
            found = None
        except OSError:  # a circle of links, or a folder that may be listed but not entered
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

    def _log_notes(self) -> None:
        for names, note in (
            (self._skipped_links, "links not followed, because they lead to folders that are listed anyway"),
            (self._unreadable, "folders that cannot be read, each counted as one failed input"),
            (self._escaped, "file names that are not UTF-8, each one failed input until it is renamed"),
        ):
            if names:
                named = ", ".join(map(repr, sorted(names)[:MAX_NAMED])) + (", ..." if len(names) > MAX_NAMED else "")
                log.warning("%s: %s: %d (%s)", self._root, note, len(names), named)


def entry_of(path: str, found: os.stat_result | None) -> Entry:
    """Return the entry of a path; size 0 and no etag unless it is known to be a regular file."""
    if found is None or not stat.S_ISREG(found.st_mode):
        return path, 0, ""
    return path, found.st_size, etag_of_file(found)
