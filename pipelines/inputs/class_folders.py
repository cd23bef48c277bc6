"""Class folders: label images by folder name, and refuse folder layouts that cannot be classes."""

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

# Files and folders that desktops, notebooks, version control, NAS devices, archives and Hadoop leave next to images,
# plus all names that begin with a dot. The match ignores case.
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
# Suffixes of files that cannot be images. A file with any other suffix, or none, may be one.
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
    """Contents of one class folder.

    Attributes:
        folders: Names of the folders directly in it.
        has_files: True if it directly contains files.
        suffixes: Lower-case suffixes of all files below it.
    """

    folders: set[str] = field(default_factory=set)
    has_files: bool = False
    suffixes: set[str] = field(default_factory=set)


def label_by_folder(location: str, object_uris: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str], int]:
    """Label every object with the name of its top-level folder below `location`.

    Args:
        location: Normalized URI of the folder that contains the class folders.
        object_uris: URIs of all objects below it.

    Returns:
        A mask of the objects that are kept, the label of each kept object, and the number of hidden and system files
        that were ignored.

    Raises:
        RequestError: A file lies outside any class folder, or the folders cannot be classes.
    """
    start = len(location.rstrip("/")) + 1
    below = pc.utf8_slice_codeunits(object_uris, start)
    is_system = pc.match_substring_regex(below, SYSTEM_PATH)
    num_ignored = pc.sum(is_system).as_py() or 0
    if num_ignored:
        names = sorted({_system_name(path) for path in below.filter(is_system).slice(0, 10_000).to_pylist()})
        log.warning("%s: ignored hidden and system files: %d (%s)", location, num_ignored, quote_names(names))
    is_kept = pc.invert(is_system)
    paths = below.filter(is_kept).to_pylist()
    if not paths:
        raise RequestError(f"no input: {location} contains only hidden and system files")
    loose = next((path for path in paths if "/" not in path), None)
    if loose is not None:
        raise RequestError(_loose_file_message(location, loose))
    labels = [path.partition("/")[0] for path in paths]
    _check_classes(location, _folders_of(paths))
    return is_kept, labels, num_ignored


def log_empty_folders(location: str, exclude: list[str], class_names: Collection[str]) -> None:
    """Log the folders directly below a local `location` that do not become classes because they contain no image."""
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
        log.warning(
            "%s: ignored folders without images, which do not become classes: %d (%s)",
            location,
            len(empty),
            quote_names(sorted(empty)),
        )


def quote_names(names: list[str]) -> str:
    """Return the first few names, quoted, and the number of the others, for use in a message."""
    return ", ".join(map(repr, names[:MAX_NAMED])) + (
        f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else ""
    )


def _system_name(path: str) -> str:
    """Return the part of a path that makes it a hidden or system file."""
    found = re.search(SYSTEM_PATH, path)
    assert found is not None
    return found[2]


def _loose_file_message(location: str, name: str) -> str:
    path = uris.join(location, name)
    if uris.is_local(path) and os.path.isdir(path):
        return f"cannot read the folder {path}: change its permissions, or leave it out with exclude '{name}/*'"
    return (
        f"{location} contains {name} outside any class folder: move it into the folder of its class, or leave it out "
        f"with exclude {name!r}"
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
    """Refuse folders that cannot be classes, and warn about folders that may not be meant as classes.

    Raises:
        RequestError: The folders are the splits of a dataset, or one of them contains no images.
    """
    splits = sorted(name for name in classes if name.lower() in SPLITS)
    have_folders = all(classes[name].folders for name in splits)
    if splits and (len(splits) == len(classes) or (len(splits) > 1 and have_folders)):
        raise RequestError(
            f"{location} contains dataset splits ({quote_names(splits)}), not classes: use one of them, such as "
            f"{uris.join(location, splits[-1])}"
        )
    for name, folder in sorted(classes.items()):
        if folder.suffixes <= NO_IMAGE_SUFFIXES:
            raise RequestError(
                f"the folder {uris.join(location, name)} contains no images, only files that end in "
                f"{', '.join(sorted(folder.suffixes))}: leave it out with exclude '{name}/*'"
            )
    if len(classes) > 1 and not any(folder.has_files for folder in classes.values()):
        deeper = sorted(set().union(*(folder.folders for folder in classes.values())))
        log.warning(
            "%s: every class folder contains only folders (%s); the top-level folders are used as classes: %s",
            location,
            quote_names(deeper),
            quote_names(sorted(classes)),
        )
