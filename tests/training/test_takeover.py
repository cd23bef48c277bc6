"""Takeover of a training run whose driver was frozen, or was killed just before it finished."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.config.parse import parse_config
from pipelines.config.sections import ModelConfig
from pipelines.config.train import TrainConfig
from pipelines.models.weights import resolve_weights
from pipelines.outputs import run_record
from pipelines.outputs.lease import Fence
from pipelines.outputs.output import Output
from pipelines.training.request import CHECKPOINTS_FILE, _identity, normalize
from pipelines.training.run import _remove_orphaned_checkpoints
from tests.support.infer import REPOSITORY, summary_of
from tests.training.test_run import all_digits, arguments, digits, in_this_process

__all__ = ["all_digits", "digits"]

QUICK_TRAIN = """
import pipelines.outputs.lease as lease
lease.HEARTBEAT_INTERVAL_S, lease.HEARTBEAT_TIMEOUT_S, lease.GIVE_UP_S = 0.5, 4.0, 3.0
from jobs.train import *
main("jobs.train", TrainConfig, train, dry_run)
"""


def start(request: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start the job in a PID namespace of its own, which a lease cannot tell from another machine."""
    isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*isolated, sys.executable, "-c", QUICK_TRAIN, *request], cwd=REPOSITORY, stdout=file, stderr=file
        )


def members(process: "subprocess.Popen[bytes]") -> list[int]:
    """Return the processes of a job's PID namespace."""
    (driver,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    namespace = os.readlink(f"/proc/{driver}/ns/pid")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "ns/pid") == namespace:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="makes PID namespaces")
def test_frozen_run_is_taken_over_and_changes_nothing_when_it_wakes(digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    request = arguments(
        digits, output, optim__epochs=4, scaling__num_workers=1, checkpoint__every_steps=5, model__name="test_resnet"
    )
    frozen: list[int] = []
    first = start(request, tmp_path / "first.log")
    try:
        while not list(output.glob("checkpoint_*")):
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.05)
        frozen = members(first)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        second = start(request, tmp_path / "second.log")
        assert second.wait(200) == 0, (tmp_path / "second.log").read_text()[-3000:]
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        assert first.wait(60) == 1
    finally:
        first.kill()
        first.wait()
    assert "another run" in (tmp_path / "first.log").read_text().splitlines()[-1]
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert after == before
    summary = summary_of((tmp_path / "second.log").read_text())
    assert summary["epochs"] == 4
    assert resolve_weights(ModelConfig(weights=summary["checkpoint_uri"])).name == "test_resnet"
    assert len(list(output.glob("checkpoint_2*"))) <= 2  # the best and the last


def test_orphaned_checkpoints_are_removed_and_the_list_of_checkpoints_stays(tmp_path: Path) -> None:
    for name in ("checkpoint_2026-01-01", "checkpoint_2026-01-02", "checkpoint_2026-01-03"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"state")
    (tmp_path / CHECKPOINTS_FILE).write_text("{}")
    best, last = (SimpleNamespace(path=f"{tmp_path}/checkpoint_2026-01-0{day}") for day in (1, 3))
    result = SimpleNamespace(best_checkpoints=[(best, {})], checkpoint=last)
    _remove_orphaned_checkpoints(Output(str(tmp_path)), result, Fence(str(tmp_path), epoch=0))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint_2026-01-01",
        "checkpoint_2026-01-03",
        CHECKPOINTS_FILE,
    }


def test_finished_run_without_success_file_gets_one(digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    request = arguments(digits, output)
    identity = _identity(normalize(parse_config(TrainConfig, request)))
    run_record.write_run(str(output), {"identity": identity, "summary": {"top1": 0.5}})
    assert in_this_process(*request) == 0
    assert (output / "_SUCCESS").exists()
    assert json.loads((output / "_run.json").read_text())["summary"] == {"top1": 0.5}
    assert in_this_process(*request) == 0
