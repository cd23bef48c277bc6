"""Listing of local folders: links, special files, permissions, and changes during the listing."""

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RequestError
from pipelines.inputs.labelled import read_labelled
from pipelines.inputs.listing import list_objects
from pipelines.storage.bulk import fetch_many
from tests.support.other_users import let_others_enter

NOBODY = 65534


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def names_under(root: Path, exclude: list[str] | None = None) -> list[str]:
    uris = list_objects(str(root), exclude or []).table["uri"].to_pylist()
    return [uri.removeprefix(f"{root}/") for uri in uris]


@pytest.mark.parametrize("link", ["latest", "1999", "a/b", "z"])
def test_link_never_displaces_the_folder_it_points_to(link: str, tmp_path: Path, caplog: Any) -> None:
    root = write(tmp_path / "in", "2024/1.jpg", "2024/deep/2.jpg", "a/3.jpg")
    (root / link).symlink_to(root / "2024")
    assert names_under(root) == ["2024/1.jpg", "2024/deep/2.jpg", "a/3.jpg"]
    assert f"'{link} -> 2024'" in caplog.text


@pytest.mark.parametrize("alias", ["a_latest", "kitten"])
def test_link_to_a_class_folder_does_not_relabel_images(alias: str, tmp_path: Path) -> None:
    root = write(tmp_path / "cls", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    (root / alias).symlink_to("cat")
    table = read_labelled(str(root), []).table
    assert table["label"].to_pylist() == ["cat", "cat", "dog"]
    assert [Path(uri).parent.name for uri in table["uri"].to_pylist()] == ["cat", "cat", "dog"]


def test_links_out_of_the_folder_are_followed_once(tmp_path: Path, caplog: Any) -> None:
    root = write(tmp_path / "in", "own.jpg")
    write(tmp_path / "store", "cat/1.jpg", "cat/deep/2.jpg")
    (tmp_path / "store" / "cat" / "back").symlink_to(root)
    for name in ("b", "a"):
        (root / name).symlink_to(tmp_path / "store" / "cat")
    assert names_under(root) == ["a/1.jpg", "a/deep/2.jpg", "own.jpg"]
    assert list_objects(str(root), []).linked == {f"{root}/a": str(tmp_path / "store" / "cat")}
    assert "listed anyway: 2 (" in caplog.text


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_links_to_a_parent_folder_are_not_followed(target: str, tmp_path: Path) -> None:
    root = write(tmp_path / "in", "sub/1.jpg")
    write(tmp_path, "beside.jpg")
    (root / "up").symlink_to(target)
    (root / "sub" / "up").symlink_to(target)
    assert names_under(root) == ["sub/1.jpg"]


def test_links_to_files_are_listed_as_files(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "a.jpg")
    (root / "b.jpg").symlink_to("a.jpg")
    assert names_under(root) == ["a.jpg", "b.jpg"]


def test_listing_tolerates_files_renamed_meanwhile(tmp_path: Path) -> None:
    root = write(tmp_path / "hot", *(f"{index:04d}.jpg" for index in range(1000)))
    with changing(lambda turn: rename_new_file(root, turn)):
        for _ in range(20):
            found = names_under(root)
            assert len([name for name in found if name[0].isdigit()]) == 1000


def test_listing_tolerates_folders_removed_meanwhile(tmp_path: Path) -> None:
    root = write(tmp_path / "hot", *(f"{index:04d}.jpg" for index in range(300)))
    with changing(lambda turn: make_and_remove_folder(root, turn)):
        for _ in range(50):
            assert len([name for name in names_under(root) if name[0].isdigit()]) == 300


class changing:
    """Context manager that calls `change` repeatedly in a thread."""

    def __init__(self, change: Any) -> None:
        self.change, self.is_over = change, False

    def _work(self) -> None:
        turn = 0
        while not self.is_over:
            self.change(turn)
            turn += 1

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        self.thread.join()


def rename_new_file(root: Path, turn: int) -> None:
    aside = root / f".new{turn}.tmp"
    aside.write_bytes(b"x")
    time.sleep(0.0005)
    aside.rename(root / f"n{turn % 50:04d}.jpg")


def make_and_remove_folder(root: Path, turn: int) -> None:
    write(root, f"d{turn % 3}/a.jpg", f"d{turn % 3}/deep/b.jpg")
    shutil.rmtree(root / f"d{turn % 3}")


def test_file_that_vanishes_before_its_stat_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "in", "a.jpg", "gone.jpg", "folder/b.jpg")
    scandir = os.scandir

    def scan_and_remove(path: str) -> Any:
        found = scandir(path)
        if path == str(root):
            os.remove(root / "gone.jpg")
            os.remove(root / "folder" / "b.jpg")
            os.rmdir(root / "folder")
        return found

    monkeypatch.setattr(os, "scandir", scan_and_remove)
    assert names_under(root) == ["a.jpg"]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it does not exist"):
        list_objects(str(tmp_path / "absent"), [])


@pytest.fixture
def without_root() -> Iterator[None]:
    """Run as a user who is subject to file permissions."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    yield
    os.seteuid(os.getuid())


def test_unreadable_folder_is_one_failed_input(tmp_path: Path, caplog: Any, request: pytest.FixtureRequest) -> None:
    root = write(tmp_path / "in", "a.jpg", "private/b.jpg", "unsearchable/c.jpg")
    let_others_enter(tmp_path)
    (root / "private").chmod(0o000)
    (root / "unsearchable").chmod(0o744)
    request.getfixturevalue("without_root")
    table = list_objects(str(root), []).table
    assert [uri.removeprefix(f"{root}/") for uri in table["uri"].to_pylist()] == [
        "a.jpg",
        "private",
        "unsearchable/c.jpg",
    ]
    assert "folders that cannot be read, each counted as one failed input: 1 ('private')" in caplog.text
    caplog.clear()
    assert names_under(root, ["private/*", "unsearchable/*"]) == ["a.jpg"]
    assert not caplog.text


def test_special_files_and_broken_links_are_listed_without_opening_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "in", "a.jpg")
    os.mkfifo(root / "fifo")
    (root / "zero").symlink_to("/dev/zero")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root)  # the path of a socket is limited to 108 bytes
        listening.bind("socket")
    found = list_objects(str(root), [])
    rows = {Path(row["uri"]).name: (row["size_bytes"], row["etag"]) for row in found.table.to_pylist()}
    assert rows.keys() == {"a.jpg", "fifo", "zero", "dangling", "loop", "socket"}
    assert {name for name, row in rows.items() if row == (0, "")} == rows.keys() - {"a.jpg"}


def test_name_that_is_not_utf8_is_listed_escaped(tmp_path: Path, caplog: Any) -> None:
    root = write(tmp_path / "in", "00.jpg", "01.jpg", "sub/02.jpg")
    os.rename(os.fsencode(root / "00.jpg"), os.fsencode(root) + b"/caf\xe9.jpg")
    os.rename(os.fsencode(root / "sub"), os.fsencode(root) + b"/\x83t")
    assert names_under(root) == ["01.jpg", r"\x83t/02.jpg", r"caf\xe9.jpg"]
    assert "file names that are not UTF-8, each counted as one failed input until it is renamed: 2 (" in caplog.text
    caplog.clear()
    assert names_under(root, ["caf*", "*t/*"]) == ["01.jpg"]
    assert not caplog.text


def test_failed_row_says_that_the_file_name_is_not_utf8(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "00.jpg", "01.jpg", r"caf\xe8.jpg")
    os.rename(os.fsencode(root / "00.jpg"), os.fsencode(root) + b"/caf\xe9.jpg")
    listed = [f"{root}/{name}" for name in names_under(root)]
    os.remove(root / "01.jpg")
    contents = {listed[found.position]: found.content for found in fetch_many(listed, max_bytes=1000)}
    assert contents[rf"{root}/caf\xe8.jpg"] == b"x"
    assert "the file name is not UTF-8: rename the file" in str(contents[rf"{root}/caf\xe9.jpg"])
    assert "no longer exists" in str(contents[f"{root}/01.jpg"])


def test_pattern_that_matches_nothing_causes_a_warning(tmp_path: Path, caplog: Any) -> None:
    root = write(tmp_path / "in", "a.jpg", "b.json")
    with caplog.at_level(logging.WARNING):
        assert names_under(root, ["*.json", "*.json,thumbs/*"]) == ["a.jpg"]
    assert caplog.messages == [f"exclude: the pattern '*.json,thumbs/*' matches nothing under {root}"]
