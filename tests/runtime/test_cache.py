"""Cache of compiled code: it trusts nothing that another user has created or can change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import cache
from pipelines.runtime.cache import cached, private_folder, use_private_compiler_cache
from tests.support.infer import REPOSITORY
from tests.support.other_users import let_others_enter

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="creates files of another user, which requires root")


def write_ours(path: Path) -> None:
    path.write_text("ours")


def make_as_nobody(*folders: Path) -> None:
    """Create folders with a file in each as another user. A shell does it, as that user cannot read our Python."""
    for folder in folders:
        script = 'mkdir -m 777 "$0" && printf theirs > "$0/key.so"'
        subprocess.run(
            ["/bin/sh", "-c", script, str(folder)], cwd="/", user=NOBODY, group=NOBODY, extra_groups=[], check=True
        )


@pytest.fixture(autouse=True)
def reset_warnings() -> None:
    cache._warn_once.cache_clear()


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the mode of /tmp that is `XDG_CACHE_HOME`, below folders that all users can enter."""
    let_others_enter(tmp_path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "fallback").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "fallback"))
    return tmp_path / "shared"


def assert_planted_file_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    path = cached("key.so", write_ours)
    assert path.read_text() == "ours"
    assert path.lstat().st_uid == os.geteuid()
    assert not path.lstat().st_mode & 0o022
    # Threads of earlier tests may log too.
    assert len([record for record in caplog.records if record.name == cache.log.name]) == 1


@needs_root
def test_folder_of_another_user_is_rejected(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_as_nobody(shared / "ecaray")
    assert_planted_file_is_rejected(caplog)
    assert "belongs to user 65534" in caplog.text
    assert (shared / "ecaray" / "key.so").read_text() == "theirs"


@needs_root
def test_folder_inside_a_folder_of_another_user_is_rejected(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_as_nobody(shared / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "home" / "cache"))
    assert_planted_file_is_rejected(caplog)


@needs_root
def test_fallback_of_another_user_is_rejected_too(shared: Path) -> None:
    shared.with_name("fallback").chmod(0o1777)
    make_as_nobody(shared / "ecaray", shared.with_name("fallback") / f"ecaray-{os.geteuid()}")
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        cached("key.so", write_ours)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_writable_by_others_is_rejected(mode: int, shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shared / "ecaray").mkdir()
    (shared / "ecaray").chmod(mode)
    (shared / "ecaray" / "key.so").write_text("theirs")
    assert_planted_file_is_rejected(caplog)


def test_symlinked_folder_is_rejected(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere" / "key.so").write_text("theirs")
    (shared / "ecaray").symlink_to(tmp_path / "elsewhere")
    assert_planted_file_is_rejected(caplog)


def test_world_writable_parent_is_rejected(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared.chmod(0o777)
    assert_planted_file_is_rejected(caplog)
    assert "all users can write to" in caplog.text


def test_file_writable_by_others_is_rebuilt(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    (private_folder() / "key.so").write_text("theirs")
    (private_folder() / "key.so").chmod(0o666)
    assert_planted_file_is_rejected(caplog)


def test_symlinked_file_is_rebuilt(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (private_folder() / "key.so").symlink_to(tmp_path / "theirs")
    assert_planted_file_is_rejected(caplog)
    assert (tmp_path / "theirs").read_text() == "theirs"


@needs_root
def test_file_of_another_user_is_rebuilt(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    (private_folder() / "key.so").write_text("theirs")
    os.chown(private_folder() / "key.so", NOBODY, NOBODY)
    assert_planted_file_is_rejected(caplog)


def test_own_folder_is_reused(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cached("key.so", write_ours) == shared / "ecaray" / "key.so"
    assert cached("key.so", lambda path: pytest.fail("built twice")).read_text() == "ours"
    assert caplog.messages == []


COMPILED = """
import ctypes, sys
from pipelines.models.cpu.winograd import load_library
assert load_library() is not None
"""


def test_torch_compiler_uses_the_private_folder(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored by monkeypatch")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    use_private_compiler_cache()
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(shared / "ecaray" / "inductor")
    os.utime(cache_dir(), (0, 0))
    cached("key.so", write_ours)
    assert Path(cache_dir()).exists()


@pytest.mark.slow
@needs_root
def test_compiled_code_of_another_user_does_not_run(shared: Path, tmp_path: Path) -> None:
    pwned = tmp_path / "pwned"
    source = tmp_path / "x.c"
    source.write_text(f'#include <stdio.h>\n__attribute__((constructor)) void x(){{fclose(fopen("{pwned}", "w"));}}')
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "x.so")], check=True)
    variables = os.environ | {"TMPDIR": str(shared.with_name("fallback"))}
    run = [sys.executable, "-c", COMPILED]
    subprocess.run(run, cwd=REPOSITORY, env=variables, check=True)
    (name,) = [path.name for path in (shared / "ecaray").glob("*.so")]
    (shared / "ecaray" / name).write_bytes((tmp_path / "x.so").read_bytes())
    subprocess.run(run, cwd=REPOSITORY, env=variables)
    assert pwned.exists()  # the library does run if it is trusted
    pwned.unlink()
    for path in [shared / "ecaray", *(shared / "ecaray").iterdir()]:
        os.chown(path, NOBODY, NOBODY)
    done = subprocess.run(run, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not pwned.exists()
