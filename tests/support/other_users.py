"""Folders of tests that other users of the machine take part in."""

from pathlib import Path


def let_others_enter(tmp_path: Path) -> None:
    """Make pytest's own folders above a test's folder searchable for all users; /tmp and what is above it stays."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder != tmp_path and not folder.name.startswith(("pytest-", "popen-")):
            return
        folder.chmod(0o755)
