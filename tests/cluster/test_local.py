"""Local object store, sample data, and the files of the installation."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.local.object_store import object_store
from cluster.local.photographs import crops
from cluster.local.processes import is_running, wait_until_gone
from tests.support.infer import REPOSITORY


@pytest.mark.integration
def test_store_leaves_no_process_and_no_files(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A user who starts a second store has the credentials of the first one in the environment.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stores")
    with object_store(("one", "two")) as store:
        assert is_running(store.pid)
        port = int(store.endpoint.rpartition(":")[2])
        folder = store.log.parent
        assert store.secret_key not in repr(store)
    assert not is_running(store.pid)
    assert not folder.exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.integration
def test_store_dies_with_its_parent_process(own_home: Path) -> None:
    code = (
        "import time; from cluster.local.object_store import object_store\n"
        "with object_store() as s:\n    print(s.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_gone(pid)


def test_runtime_env_is_valid_and_contains_no_secret() -> None:
    from ray.runtime_env import RuntimeEnv

    content = yaml.safe_load((REPOSITORY / "cluster" / "runtime_env.yaml").read_text())
    RuntimeEnv(**content)
    assert not any("SECRET" in name or "KEY" in name for name in content["env_vars"])
    kept = {"pipelines/", "jobs/", "configs/", "cluster/"}
    assert not kept & set(content["excludes"])


def test_crops_differ_from_each_other() -> None:
    pixels = {crop.tobytes() for _, crop in crops(200, size=(64, 48))}
    assert len(pixels) == 200


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements.constraints", "Makefile", ".ci/run", "pyproject.toml"]
)
def test_no_package_index_is_named(name: str) -> None:
    content = (REPOSITORY / name).read_text()
    assert "index-url" not in content.replace("--no-emit-index-url", "")
    assert "://" not in content


def test_lock_pins_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [entry for group in project["optional-dependencies"].values() for entry in group]
    wanted = {
        entry.partition(">")[0].partition("=")[0].partition("[")[0].lower()
        for entry in (*project["dependencies"], *extras)
        if not entry.startswith("ecaray")
    }
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pinned = {line.partition("==")[0].partition("[")[0].lower() for line in lines if "==" in line}
    assert wanted <= pinned
