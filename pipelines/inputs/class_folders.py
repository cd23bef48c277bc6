"""Folders named for classes: which label each image has, and which folders cannot be meant as classes."""

import fnmatch
import logging
import mimetypes
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import RequestError
from pipelines.storage import uris

log = logging.getLogger(__name__)

# What desktops, notebooks, version control, NAS devices, archives and Hadoop leave beside images. Names that begin
# with a dot are hidden everywhere; the others are spelled as their makers do, in any case.
SYSTEM_NAMES = (
    r"\.[^/]+",
    *("__MACOSX", "__pycache__", "Icon\r", "Network Trash Folder", "Temporary Items", "TheVolumeSettingsFolder"),
    *(r"Thumbs\.db[^/]*", r"ehthumbs[^/]*\.db", r"desktop\.ini", r"picasa\.ini", r"~\$[^/]+"),
    *(r"\$RECYCLE\.BIN", "RECYCLER", "System Volume Information", r"lost\+found"),
    *("@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "@__thumb", "#recycle", "#snapshot"),
    *("_SUCCESS", r"[^/]*_\$folder\$"),
)
SYSTEM_PATH = rf"(?i)(^|/)({'|'.join(SYSTEM_NAMES)})(/|$)"
SPLITS = {
    *("train", "training", "trainset", "val", "valid", "validation", "valset"),
    *("test", "testing", "testset", "dev", "eval", "evaluation", "holdout"),
}
# Of files that are surely no images; whatever has another suffix, or none, may be one.
NO_IMAGE_SUFFIXES = {
    suffix
    for suffix, kind in mimetypes.MimeTypes().types_map[True].items()
    if not kind.startswith("image/") and kind not in ("application/octet-stream", "application/postscript")
} | {
    ".jsonl",
    ".yaml",
    ".yml",
    ".toml",
    ".log",
    ".ipynb",
    ".npy",
    ".npz",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".parquet",
}
MAX_NAMED = 3


@dataclass
class _Folder:
    """One class folder: the names of the folders in it, whether files lie directly in it, and their suffixes."""

    folders: set[str] = field(default_factory=set)
    has_files: bool = False
    suffixes: set[str] = field(default_factory=set)


def label_by_folder(location: str, object_uris: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str], int]:
    """Label every object with the name of its folder directly below `location`.

    Args:
        location: normalized URI of the folder of classes.
        object_uris: everything below it.

    Returns:
        Whether each object is kept, the label of each that is, and how many hidden and system files were left out.

    Raises:
        RequestError: a file lies outside any folder, or the folders cannot be meant as classes.
    """
    start = len(location.rstrip("/")) + 1
    below = pc.utf8_slice_codeunits(object_uris, start)
    is_system = pc.match_substring_regex(below, SYSTEM_PATH)
    num_left_out = pc.sum(is_system).as_py() or 0
    if num_left_out:
        names = sorted({_system_name(path) for path in below.filter(is_system).slice(0, 10_000).to_pylist()})
        log.warning("%s: hidden and system files left out: %d (%s)", location, num_left_out, named(names))
    is_kept = pc.invert(is_system)
    paths = below.filter(is_kept).to_pylist()
    if not paths:
        raise RequestError(f"no input: {location} holds nothing but hidden and system files")
    loose = next((path for path in paths if "/" not in path), None)
    if loose is not None:
        raise RequestError(_loose_message(location, loose))
    labels = [path.partition("/")[0] for path in paths]
    _check_classes(location, _folders_of(paths))
    return is_kept, labels, num_left_out


def log_empty_folders(location: str, exclude: list[str], class_names: Collection[str]) -> None:
    """Log the folders directly below a local `location` that hold no image, and so are no classes."""
    with os.scandir(location) as children:
        folders = [child.name for child in children if child.is_dir(follow_symlinks=False)]
    system = pc.match_substring_regex(pa.array(folders, pa.string()), SYSTEM_PATH).to_pylist()
    empty = [
        name
        for name, is_system in zip(folders, system)
        if not is_system
        and name not in class_names
        and not any(fnmatch.fnmatch(f"{name}/", pattern) for pattern in exclude)
    ]
    if empty:
        log.warning("%s: empty folders, which are no classes: %d (%s)", location, len(empty), named(sorted(empty)))


def named(names: list[str]) -> str:
    """Return the first names, quoted, for a message."""
    return ", ".join(map(repr, names[:MAX_NAMED])) + (
        f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else ""
    )


def _system_name(path: str) -> str:
    """Return the part of a path for which it counts as a system file."""
    found = re.search(SYSTEM_PATH, path)
    assert found is not None
    return found[2]


def _loose_message(location: str, name: str) -> str:
    path = uris.join(location, name)
    if uris.is_local(path) and os.path.isdir(path):
        return f"the folder {path} cannot be read: change its permissions, or leave it out with exclude '{name}/*'"
    return (
        f"{location} holds {name} outside any folder: folders are named for their class; move it, or leave it out with "
        f"exclude {name!r}"
    )


def _folders_of(paths: Iterable[str]) -> dict[str, _Folder]:
    found: dict[str, _Folder] = defaultdict(_Folder)
    for path in paths:
        label, _, rest = path.partition("/")
        folder, separator, _ = rest.partition("/")
        if separator:
            found[label].folders.add(folder)
        else:
            found[label].has_files = True
        found[label].suffixes.add(posixpath.splitext(rest)[1].lower())
    return found


def _check_classes(location: str, classes: dict[str, _Folder]) -> None:
    """Refuse folders that cannot be meant as classes, and say of those that may not be what their labels are.

    Raises:
        RequestError: they are the splits of a set, or one of them holds no images.
    """
    splits = sorted(name for name in classes if name.lower() in SPLITS)
    have_folders = all(classes[name].folders for name in splits)
    if splits and (len(splits) == len(classes) or (len(splits) > 1 and have_folders)):
        raise RequestError(
            f"{location} holds splits of a set ({named(splits)}), not classes: name one of them, such as "
            f"{uris.join(location, splits[-1])}"
        )
    for name, folder in sorted(classes.items()):
        if folder.suffixes <= NO_IMAGE_SUFFIXES:
            raise RequestError(
                f"the folder {uris.join(location, name)} holds no images, only files that end in "
                f"{', '.join(sorted(folder.suffixes))}: leave it out with exclude '{name}/*'"
            )
    if len(classes) > 1 and not any(folder.has_files for folder in classes.values()):
        deeper = sorted(set().union(*(folder.folders for folder in classes.values())))
        log.warning(
            "%s: every class folder holds folders (%s) and no files; the classes are the folders above these: %s",
            location,
            named(deeper),
            named(sorted(classes)),
        )
