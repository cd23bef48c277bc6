"""`jobs.train` as a user types it, on scikit-learn's digits: real images that train in a minute."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from pipelines.config.sections import ModelConfig
from pipelines.models.weights import resolve_weights
from tests.support.infer import REPOSITORY, run_command, summary_of

SMALL = "ecaresnet26t"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` and `validation` of digits in folders named for them; one training image is none."""
    root = tmp_path_factory.mktemp("digits")
    found: Any = sklearn.datasets.load_digits()
    for index, (pixels, target) in enumerate(zip(found.images[:400], found.target[:400])):
        folder = root / ("validation" if index % 4 == 3 else "train") / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((32, 32)).save(folder / f"{index}.png")
    (root / "train" / "3" / "torn.png").write_bytes(b"no image")
    return root


def arguments(digits: Path, output: Path, **keys: object) -> list[str]:
    request: dict[str, object] = {
        "data.train.uri": digits / "train",
        "data.validation.uri": digits / "validation",
        "output.uri": output,
        "model.name": SMALL,
        "model.weights": "random",
        "preprocess.image_size": 32,
        "optim.epochs": 3,
        "optim.global_batch_size": 16,
        "optim.lr": 0.05,
        "augment.hflip": 0,
        "augment.scale": [0.7, 1],
        "scaling.num_workers": 2,
    }
    request |= {key.replace("__", "."): value for key, value in keys.items()}
    return ["jobs.train", *[word for key, value in request.items() for word in (f"--{key}", str(value))]]


def test_training_on_two_workers_and_what_it_leaves(digits: Path, tmp_path: Path, own_home: Path) -> None:
    output = tmp_path / "run"
    done = run_command(*arguments(digits, output), timeout_s=200)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = summary_of(done.stdout)
    assert summary["epochs"] == 3
    assert summary["top1"] > 0.5
    assert summary["num_failed"] == 1
    assert "not_an_image" in summary["failed"][0]["error"]
    assert "epoch 3 of 3 done" in done.stderr + done.stdout
    weights = resolve_weights(ModelConfig(weights=summary["checkpoint_uri"]))
    assert weights.name == SMALL
    assert weights.checkpoint_config["label_names"] == [str(digit) for digit in range(10)]
    assert weights.pretrained_cfg["input_size"] == [3, 32, 32]
    record = json.loads((output / "_run.json").read_text())
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2, 3]
    # Again, and again with another recipe.
    again = run_command(*arguments(digits, output))
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    assert summary_of(again.stdout) == summary
    other = run_command(*arguments(digits, output, optim__lr=0.1))
    assert other.returncode == 2
    assert "optim.lr was 0.05, is 0.1" in other.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(digits: Path, tmp_path: Path, own_home: Path) -> None:
    keys = {"scaling__num_workers": 1, "checkpoint__every_steps": 5, "optim__epochs": 2}
    straight = run_command(*arguments(digits, tmp_path / "straight", **keys), timeout_s=250)
    assert straight.returncode == 0, straight.stderr[-3000:]
    broken = arguments(digits, tmp_path / "broken", **keys)
    driver = subprocess.Popen(
        [sys.executable, "-m", *broken], cwd=REPOSITORY, env=os.environ, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    # Ray Train's own list of checkpoints: what it names is there.
    while not (tmp_path / "broken" / "checkpoint_manager_snapshot.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    driver.kill()
    driver.wait()
    resumed = run_command(*broken, timeout_s=250)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on at step" in resumed.stderr + resumed.stdout
    first, second = (summary_of(run.stdout) for run in (straight, resumed))
    assert first["top1"] == second["top1"]
    ours, theirs = (resolve_weights(ModelConfig(weights=one["checkpoint_uri"])).state_dict for one in (first, second))
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
