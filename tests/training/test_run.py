"""`jobs.train` end to end on scikit-learn's digits, real images that train in a minute."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from cluster.local.digits import write_digits
from cluster.local.object_store import ObjectStore
from cluster.local.processes import descendants, kill_tree
from cluster.local.ray_head import RayHead
from pipelines.config.export import ExportConfig
from pipelines.config.parse import parse_config
from pipelines.config.sections import ModelConfig
from pipelines.config.train import TrainConfig
from pipelines.errors import RunError
from pipelines.models.catalogue import MODEL_CARDS
from pipelines.models.weights import resolve_weights
from pipelines.runtime.job import run_job
from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, read_bytes
from pipelines.training import run
from pipelines.training.export import run as export
from tests.support.failing_training import failing_worker
from tests.support.infer import REPOSITORY, run_command, summary_of
from tests.support.recorded_training import read_records

SMALL = "ecaresnet26t"
GLOBAL_BATCH_SIZE = 16


@pytest.fixture(scope="module")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` and `held-out` with all digits, in one folder per class."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(str(root / "train"), str(root / "held-out"))
    return root


@pytest.fixture(scope="module")
def digits(all_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the digits, plus a training file that is not an image."""
    root = tmp_path_factory.mktemp("few")
    for path in sorted(all_digits.rglob("*.png")):
        if int(path.stem) < 450:
            target = root / path.relative_to(all_digits)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (root / "train" / "3" / "torn.png").write_bytes(b"no image")
    return root


def arguments(digits: object, output: object, **keys: object) -> list[str]:
    """Return the command line of a request, whose keys are given with `__` in place of the dot."""
    request: dict[str, object] = {
        "data.train.uri": f"{digits}/train",
        "data.validation.uri": f"{digits}/held-out",
        "output.uri": output,
        "model.name": SMALL,
        "model.weights": "random",
        "preprocess.image_size": 32,
        "optim.epochs": 3,
        "optim.global_batch_size": GLOBAL_BATCH_SIZE,
        "optim.lr": 0.05,
        "augment.hflip": 0,
        "augment.scale": [0.7, 1],
        "scaling.num_workers": 2,
        "logging.every_s": 1,
    }
    request |= {key.replace("__", "."): value for key, value in keys.items()}
    return [word for key, value in request.items() if value is not None for word in (f"--{key}", str(value))]


def state_dict_of(summary: dict[str, Any]) -> dict[str, Any]:
    return resolve_weights(ModelConfig(weights=summary["checkpoint_uri"])).state_dict


def assert_same_weights(first: dict[str, Any], second: dict[str, Any]) -> None:
    ours, theirs = state_dict_of(first), state_dict_of(second)
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_training_from_s3_to_s3_writes_the_documented_output(
    digits: Path, store: ObjectStore, own_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.storage.filesystem import open_filesystem

    filesystem, path = open_filesystem("s3://images/digits")
    filesystem.put(f"{digits}/", f"{path}/", recursive=True)
    output = "s3://results/digits-run"
    request = arguments("s3://images/digits", output, optim__epochs=2)
    done = run_command("jobs.train", *request, timeout_s=200)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = summary_of(done.stdout)
    assert summary["epochs"] == 2
    assert summary["top1"] > 0.3
    assert summary["num_failed"] == 1
    assert "torn.png: not_an_image" in summary["failed"][0]
    assert "epoch 2 of 2 done" in done.stderr
    assert "Failed to query" not in done.stderr
    assert store.secret_key not in done.stderr
    weights = resolve_weights(ModelConfig(weights=summary["checkpoint_uri"]))
    assert weights.name == SMALL
    assert weights.checkpoint_config["label_names"] == [str(digit) for digit in range(10)]
    assert weights.pretrained_cfg["input_size"] == [3, 32, 32]
    record = json.loads(read_bytes(uris.join(output, "_run.json")))
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
    names = list_names(output)
    assert {"_SUCCESS", "curves.png", "metrics.jsonl", "tensorboard", "_data"} <= set(names)
    assert len([name for name in names if name.startswith("checkpoint_2")]) <= 2  # the best and the last
    lines = [json.loads(line) for line in read_bytes(uris.join(output, "metrics.jsonl")).splitlines()]
    assert [line["top1"] for line in lines if line["kind"] == "epoch"] == [one["top1"] for one in record["history"]]
    # The same request returns the same summary; another recipe is rejected.
    assert in_this_process(*request) == 0
    assert json.loads(capfd.readouterr().out) == summary
    assert in_this_process(*arguments("s3://images/digits", output, optim__epochs=2, optim__lr=0.1)) == 2
    assert "optim.lr was 0.05, is 0.1" in capfd.readouterr().err


def in_this_process(*request: str) -> int:
    """Run the job in this process, which saves the time of its imports. Return its exit status."""
    from jobs.train import dry_run, train

    return run_job("jobs.train", TrainConfig, train, request, dry_run)


def test_dry_run_logs_the_plan_and_writes_nothing(digits: Path, tmp_path: Path) -> None:
    done = run_command("jobs.train", *arguments(digits, tmp_path / "out"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["optim"]["global_batch_size"] == GLOBAL_BATCH_SIZE
    plan = ("18 steps per epoch (13 images left out of each), 54 in total", "learning rate", "memory per worker")
    for expected in plan:
        assert expected in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_request_exits_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = run_command("jobs.train", *arguments("/absent", tmp_path / "out"), timeout_s=30)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("jobs.train: error: no input: nothing found under /absent")
    assert done.stdout == ""


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "unknown optimizer": ({"optim__opt": "sdg"}, "did you mean sgd"),
    "unknown augmentation": ({"augment__auto_augment": "nonsense"}, "augment.auto_augment"),
    "synchronized norm on CPUs": ({"model__sync_batch_norm": True}, "torch synchronizes batch norm on GPUs only"),
    "too few images": ({"optim__global_batch_size": 4096}, "fewer than one batch"),
    "unknown class": ({"data__validation__uri": "OTHER"}, "'eleven'"),
    "unknown model": ({"model__name": "ecaresnet51d"}, "knows no model"),
    "missing weights": ({"model__weights": "/absent"}, "no weights at /absent"),
    "too many workers": ({"scaling__num_workers": 16}, "scaling.num_workers = 16"),
    "output with other files": ({"output__uri": REPOSITORY}, "is not empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_request_is_explained(
    name: str, digits: Path, tmp_path: Path, own_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, message = WRONG[name]
    (tmp_path / "other" / "eleven").mkdir(parents=True)
    (tmp_path / "other" / "eleven" / "1.png").write_bytes(b"")
    replaced = {key: value if value != "OTHER" else tmp_path / "other" for key, value in keys.items()}
    assert in_this_process(*arguments(digits, tmp_path / "out", **replaced)) == 2
    printed = capfd.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].startswith("jobs.train: error: ")
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.slow
def test_too_many_failed_images_stop_the_run_with_one_line(digits: Path, tmp_path: Path, own_home: Path) -> None:
    listed = ["uri,label"]
    for index, path in enumerate(sorted((digits / "train").rglob("*.png"))):
        listed.append(f"{path if index % 4 else '/absent.png'},{path.parent.name}")
    (tmp_path / "train.csv").write_text("\n".join(listed))
    keys = {"data__train__uri": tmp_path / "train.csv"}
    done = run_command("jobs.train", *arguments(digits, tmp_path / "out", **keys), timeout_s=200)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jobs.train: error: ")
    assert "more than failure.max_fraction = 0.05" in last
    assert "not_found" in last


@pytest.mark.slow
def test_nan_loss_stops_the_run_and_another_recipe_may_use_the_output(
    ray_server: RayHead, digits: Path, tmp_path: Path
) -> None:
    keys: dict[str, object] = {"optim__lr": 1e6, "optim__epochs": 1, "logging__every_s": 0.01}
    with pytest.raises(RunError, match=r"the loss is NaN or infinite from step \d of 18 on, at learning rate 9.*e\+05"):
        train_on(ray_server, *arguments(digits, tmp_path / "out", **keys))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "_SUCCESS" not in left
    assert not [name for name in left if name.startswith("checkpoint")]
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert in_this_process(*arguments(digits, tmp_path / "out", optim__lr=0.05), "--dry-run") == 0


@pytest.mark.slow
def test_unreadable_validation_images_are_counted_and_limited(
    ray_server: RayHead, digits: Path, tmp_path: Path
) -> None:
    images = sorted((digits / "held-out").rglob("*.png"))[:40]
    listed = (
        ["uri,label"] + [f"{path},{path.parent.name}" for path in images] + [f"/absent/{i}.png,3" for i in range(4)]
    )
    (tmp_path / "validation.csv").write_text("\n".join(listed))
    keys: dict[str, object] = {"data__validation__uri": tmp_path / "validation.csv", "optim__epochs": 1}
    keys |= {"optim__global_batch_size": 150, "scaling__num_workers": 1}
    with pytest.raises(RunError, match=r"4 of 44 validation images failed, the first: /absent/0\.png: not_found"):
        train_on(ray_server, *arguments(digits, tmp_path / "out", **keys))
    more: dict[str, object] = {"failure__max_fraction": 0.2, "optim__ema_decay": 0.9}
    summary = train_on(ray_server, *arguments(digits, tmp_path / "out", **keys, **more))
    assert summary["num_validation_failed"] == 4
    assert "/absent/0.png: not_found" in summary["validation_failed"][0]
    assert summary["best_epoch"] == 1
    # The checkpoint holds the weights that the summary names, and so does an export of its state.
    (epoch,) = json.loads((tmp_path / "out" / "_run.json").read_text())["history"]
    assert summary["weights"] == epoch["of"] == max(("model", "average"), key=lambda name: float(epoch[f"{name}_top1"]))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.pt").write_bytes(read_bytes(uris.join(summary["checkpoint_uri"], "state.pt")))
    export(
        ExportConfig.model_validate(
            {"checkpoint": {"uri": f"{tmp_path}/state"}, "output": {"uri": f"{tmp_path}/exported"}}
        )
    )
    assert_same_weights(summary, {"checkpoint_uri": f"{tmp_path}/exported"})


@pytest.mark.slow
def test_code_error_does_not_restart_the_workers(
    ray_server: RayHead,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "run_worker", failing_worker)
    with pytest.raises(RunError, match=r"TypeError: the local batch is invalid \(.*loop.py, line \d+\); no checkpoint"):
        train_on(ray_server, *arguments(digits, tmp_path / "out"))
    assert len(list((tmp_path / "starts").iterdir())) == 2  # one start per worker
    assert "the local batch is invalid" not in capfd.readouterr().err


def kill_worker(driver: "subprocess.Popen[bytes]") -> None:
    """Kill one training worker. Ray Train restarts the workers."""
    workers = [pid for pid, name in descendants(driver.pid).items() if name.startswith("ray::RayTrainWorker")]
    os.kill(workers[0], signal.SIGKILL)


def kill_all_of_ray(driver: "subprocess.Popen[bytes]") -> None:
    """Kill the driver and all of Ray at once."""
    kill_tree(driver.pid)


RECORDED: dict[str, Any] = {"checkpoint__every_steps": 5, "optim__epochs": 2}


def record(folder: Path, digits: Path, **keys: object) -> "subprocess.Popen[bytes]":
    """Start a run that records the ids of its local batches."""
    request = arguments(digits, folder / "output", **(RECORDED | keys))
    command = [sys.executable, "-m", "tests.support.recorded_training", str(folder / "record"), *request]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def end(run: "subprocess.Popen[bytes]") -> dict[str, Any]:
    stdout, stderr = run.communicate(timeout=280)
    assert run.returncode == 0, stderr[-3000:].decode()
    return summary_of(stdout.decode())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_workers", "kill"), [(1, kill_all_of_ray), (2, kill_worker)])
def test_run_resumes_at_the_batch_after_the_last_checkpoint(
    num_workers: int,
    kill: Callable[["subprocess.Popen[bytes]"], None],
    digits: Path,
    tmp_path: Path,
    own_home: Path,
) -> None:
    expected = end(record(tmp_path / "undisturbed", digits, scaling__num_workers=num_workers))
    expected_records = read_records(tmp_path / "undisturbed" / "record")
    folder = tmp_path / "run"
    run = record(folder, digits, scaling__num_workers=num_workers)
    wait_for_checkpoint(folder / "output")
    kill(run)
    if kill is kill_all_of_ray:
        run.communicate(timeout=60)
        run = record(folder, digits, scaling__num_workers=num_workers)
    summary = end(run)
    ids = {(line["step"], line["rank"]): line["ids"] for lines in expected_records for line in lines}
    records = read_records(folder / "record")
    assert all(line["ids"] == ids[line["step"], line["rank"]] for lines in records for line in lines)
    # The second attempt starts after a checkpoint within the first epoch, and runs to the end.
    first, second = ([line["step"] for line in lines] for lines in records if lines[0]["rank"] == 0)
    assert 0 < second[0] < 18
    assert second[0] % 5 == 0
    assert first == list(range(len(first)))
    assert second[0] <= len(first)
    assert second == list(range(second[0], 36))
    assert abs(summary["top1"] - expected["top1"]) < 0.15
    if num_workers == 1:
        assert_same_weights(summary, expected)
    lines = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if line["kind"] == "step"]
    assert logged == sorted(set(logged))


def wait_for_checkpoint(output: Path) -> None:
    """Wait for Ray Train's list of checkpoints, which only names complete ones."""
    deadline = time.monotonic() + 120
    while not (output / "checkpoint_manager_snapshot.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def train_on(server: RayHead, *request: str) -> dict[str, Any]:
    """Run the job in this process on the tests' Ray cluster. Return its summary."""
    from jobs.train import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", server.address)
        patch.setenv("HOME", str(server.home))
        return train(parse_config(TrainConfig, request))


@pytest.mark.slow
def test_number_of_workers_may_be_a_range(ray_server: RayHead, digits: Path, tmp_path: Path) -> None:
    request = arguments(digits, tmp_path / "out", scaling__num_workers=[1, 2], optim__epochs=1)
    assert train_on(ray_server, *request)["epochs"] == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_validation_counts_each_image_once_for_any_number_of_workers(
    ray_server: RayHead, all_digits: Path, tmp_path: Path
) -> None:
    listed = ["uri,label"] + [f"{path},{path.parent.name}" for path in sorted(all_digits.rglob("*.png"))[:1001]]
    (tmp_path / "validation.csv").write_text("\n".join(listed))
    torch.manual_seed(0)
    state = timm.create_model(SMALL, num_classes=10).state_dict()
    state["fc.weight"] *= 1000  # otherwise all images get the same class
    safetensors.torch.save_file(state, tmp_path / "ten.safetensors")
    keys = {
        "model__weights": tmp_path / "ten.safetensors",
        "model__freeze_batch_norm": True,
        "data__validation__uri": tmp_path / "validation.csv",
        "optim__epochs": 1,
        "optim__global_batch_size": 600,
        "optim__lr": 1e-30,  # too small for any weight to move
    }
    found = []
    for num_workers in (1, 3):
        output = tmp_path / str(num_workers)
        train_on(ray_server, *arguments(all_digits, output, scaling__num_workers=num_workers, **keys))
        (last,) = json.loads((output / "_run.json").read_text())["history"]
        found.append([last[key] for key in ("num_validation_images", "top1", "top5", "num_validation_failed")])
    assert found[0][0] == 1001
    assert 0 < found[0][1] < found[0][2] < 1
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_CARDS)
def test_every_documented_model_trains_for_two_steps(
    ray_server: RayHead, name: str, digits: Path, tmp_path: Path
) -> None:
    images = sorted(path for path in (digits / "train").rglob("*.png") if path.stem != "torn")[::18][:16]
    (tmp_path / "train.csv").write_text("\n".join(["uri,label", *[f"{path},{path.parent.name}" for path in images]]))
    data = {"data__train__uri": tmp_path / "train.csv", "data__validation__uri": tmp_path / "train.csv"}
    keys = {"model__name": name, "optim__global_batch_size": 8, "optim__epochs": 1, "scaling__num_workers": 1}
    summary = train_on(ray_server, *arguments(digits, tmp_path / "out", **data, **keys, preprocess__image_size=64))
    (last,) = json.loads((tmp_path / "out" / "_run.json").read_text())["history"]
    assert (last["step"], last["num_validation_images"]) == (2, 16)
    assert resolve_weights(ModelConfig(weights=summary["checkpoint_uri"])).name == name
