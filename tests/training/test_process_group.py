"""Training on one machine: its listening ports, and its log beside another Ray cluster."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.local.digits import write_digits
from cluster.local.ray_head import RayHead
from tests.support.infer import REPOSITORY
from tests.support.ports import is_loopback, listeners_of


@pytest.mark.slow
def test_training_beside_another_ray_is_quiet_and_listens_on_loopback(ray_server: RayHead, tmp_path: Path) -> None:
    write_digits(str(tmp_path / "all"), str(tmp_path / "few"))
    for path in (tmp_path / "few").rglob("*.png"):
        if int(path.stem) > 200:
            path.unlink()
    keys = {
        "config": "configs/train/digits.yaml",
        "data.train.uri": tmp_path / "few",
        "data.validation.uri": tmp_path / "few",
        "output.uri": tmp_path / "out",
        "model.name": "resnet10t",
        "optim.epochs": 1,
        "optim.warmup_epochs": 0,
    }
    command = [sys.executable, "-m", "jobs.train", *(word for key in keys for word in (f"--{key}", str(keys[key])))]
    others: set[str] = set()
    workers: set[str] = set()
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, env=os.environ | {"PYTHONWARNINGS": ""})
        while job.poll() is None:
            found = listeners_of(job.pid)
            others |= {f"{listener.host} {listener.process}" for listener in found if not is_loopback(listener.host)}
            workers |= {listener.process for listener in found if "RayTrainWorker" in listener.process}
            time.sleep(0.2)
    logged = (tmp_path / "log").read_text()
    assert job.returncode == 0, logged
    assert workers
    assert others == set()
    assert "epoch 1 of 1 done" in logged
    for noise in ("Traceback", "Found multiple active Ray", "pid=", "\x1b", "core_worker.cc"):
        assert noise not in logged
