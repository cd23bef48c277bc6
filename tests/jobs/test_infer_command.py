"""`jobs.infer` run by its command line: its output and exit status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm

from cluster.local.faulty_proxy import Faults, faulty_proxy
from cluster.local.object_store import ObjectStore
from cluster.local.photographs import crops, encode
from cluster.local.ray_head import RayHead
from pipelines.storage.bulk import store_object
from tests.support.infer import REPOSITORY, read_kind, run_command, summary_of

SMALL = "ecaresnet26t"
# Time limit of a wrong request, which takes well under half of it on an idle machine.
LIMIT_S = 30


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(photographs.iterdir())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "resnet18.safetensors"
    safetensors.torch.save_file(timm.create_model("resnet18").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def seven_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seven") / "seven.safetensors"
    safetensors.torch.save_file(timm.create_model(SMALL, num_classes=7).state_dict(), path)
    return path


RANDOM = {"model.name": SMALL, "model.weights": "random"}
WRONG: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    # name: keys that override those of a valid request, environment variables, part of the error
    "unknown key": ({"model.nam": "x"}, {}, "did you mean model.name?"),
    "unknown model": ({"model.name": "ecaresnet51d"}, {}, "knows no model 'ecaresnet51d'"),
    "missing weights": ({"model.weights": "/absent/w.safetensors"}, {}, "/absent/w.safetensors: it does not exist"),
    "unreachable hub": ({"model.weights": "pretrained"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "--model.weights"),
    "weights of another architecture": ({"model.weights": "OTHER"}, {}, f"do not fit {SMALL}"),
    "missing input": ({"input.uri": "/absent/images"}, {}, "nothing found under /absent/images"),
    "empty input": ({"input.uri": "EMPTY"}, {}, "no input: nothing found under"),
    "empty prefix": ({"input.uri": "s3://images/absent/"}, {}, "nothing found under s3://images/absent"),
    "no such bucket": ({"input.uri": "s3://absent/x"}, {}, "s3://absent/x"),
    "unreachable endpoint": ({"input.uri": "s3://images/x"}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    "endpoint without a scheme": ({"input.uri": "s3://images/x"}, {"AWS_ENDPOINT_URL": "localhost:1"}, "is not a URL"),
    "wrong credentials": (
        {"input.uri": "s3://images/x"},
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        "cannot reach s3://images/x",
    ),
    "unwritable output": ({"output.uri": "/proc/out"}, {}, "cannot write to /proc/out"),
    "output inside the input": ({"output.uri": "IMAGES/out"}, {}, "lies inside input.uri"),
    "foreign output": ({"output.uri": "IMAGES/.."}, {}, "is not empty"),
    "more CPUs than available": ({"compute.num_workers": "500"}, {}, "compute.num_workers = 500"),
    "more GPUs than available": ({"compute.use_gpu": "true", "compute.num_workers": "9"}, {}, "asks for 9 GPUs"),
    "int8 on GPUs": ({"model.dtype": "int8", "compute.use_gpu": "true"}, {}, "GPUs"),
    "compiling for CPUs": ({"model.compile": "true"}, {}, "model.compile is for GPUs"),
    "topk above the classes": ({"model.weights": "SEVEN", "outputs.topk": "8"}, {}, "the model has 7 classes"),
    "nothing to write": ({"outputs.topk": "0", "outputs.embedding": "false"}, {}, "nothing to write"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_exit_with_status_2_and_one_line(
    name: str, images: Path, other_weights: Path, seven_classes: Path, store: ObjectStore, tmp_path: Path
) -> None:
    keys, variables, message = WRONG[name]
    (tmp_path / "empty").mkdir()
    paths = {"IMAGES": images, "OTHER": other_weights, "SEVEN": seven_classes, "EMPTY": tmp_path / "empty"}
    request = {"input.uri": str(images), "output.uri": str(tmp_path / "out"), **RANDOM, **keys}
    for placeholder, path in paths.items():
        request = {key: value.replace(placeholder, str(path)) for key, value in request.items()}
    arguments = [word for key, value in request.items() for word in (f"--{key}", value)]
    done = run_command("jobs.infer", *arguments, timeout_s=LIMIT_S, **variables)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jobs.infer: error: ")
    assert message in lines[0]
    assert done.stdout == ""
    assert store.secret_key not in done.stderr
    assert not (tmp_path / "out").exists()


def test_valid_request_on_a_local_ray(images: Path, seven_classes: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"input.uri": images, "output.uri": tmp_path / "out", "model.name": SMALL}
    keys |= {"model.weights": seven_classes, "preprocess.image_size": 96}
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    done = run_command("jobs.infer", *arguments, timeout_s=150)
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert (summary["num_ok"], summary["output_uri"]) == (6, str(tmp_path / "out"))
    assert "6 of 6 images" in done.stderr
    rows = read_kind(str(tmp_path / "out"), "part")
    assert {len(index) for index in rows["index"].to_pylist()} == {5}
    assert {label for labels in rows["label"].to_pylist() for label in labels} <= {str(index) for index in range(7)}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_job_resumes_with_the_same_command(
    number: signal.Signals, photographs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    keys: dict[str, Any] = {"input.uri": photographs, "output.uri": output, "model.name": SMALL}
    keys |= {"model.weights": "random", "output.commit_rows": 8, "compute.batch_size": 8, "preprocess.image_size": 320}
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "jobs.infer", *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not list(output.glob("part-*.parquet")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "jobs.infer: error: interrupted; run the same command again to resume"
    assert not (output / "_SUCCESS").exists()
    again = run_command("jobs.infer", *arguments)
    assert again.returncode == 0, again.stderr
    summary = summary_of(again.stdout)
    assert summary["num_resumed"] >= 8
    assert summary["num_ok"] == summary["num_inputs"]
    ids = read_kind(str(output), "part")["id"].to_pylist()
    assert ids == list(range(summary["num_inputs"]))


@pytest.mark.slow
def test_submitted_job_writes_the_same_rows_and_reports_failure(
    ray_server: RayHead, images: Path, seven_classes: Path, tmp_path: Path
) -> None:
    def submit(output: Path, weights: Path) -> "subprocess.CompletedProcess[str]":
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--"]
        command += ["python", "-m", "jobs.infer", "--input.uri", str(images), "--output.uri", str(output)]
        command += ["--model.name", SMALL, "--model.weights", str(weights)]
        environment = os.environ | ray_server.environment()
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)

    good = submit(tmp_path / "submitted", seven_classes)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "succeeded" in good.stdout
    assert '"num_ok": 6' in good.stdout
    keys = {"input.uri": images, "output.uri": tmp_path / "alone", "model.name": SMALL, "model.weights": seven_classes}
    alone = run_command("jobs.infer", *[word for key, value in keys.items() for word in (f"--{key}", str(value))])
    assert alone.returncode == 0, alone.stderr
    assert read_kind(str(tmp_path / "submitted"), "part").equals(read_kind(str(tmp_path / "alone"), "part"))
    bad = submit(tmp_path / "bad", Path("/absent.safetensors"))
    assert bad.returncode == 1
    assert "failed with exit code 2" in bad.stdout + bad.stderr


def test_models_prints_the_family() -> None:
    done = run_command("jobs.models", "--names", "ecaresnet50d_pruned", "--names", "ecaresnetlight")
    assert done.returncode == 0, done.stderr
    models = summary_of(done.stdout)["models"]
    assert [model["name"] for model in models] == ["ecaresnet50d_pruned", "ecaresnetlight"]
    assert models[0]["num_features"] == 2022
    unknown = run_command("jobs.models", "--names", "nosuch")
    assert unknown.returncode == 2
    assert "knows no model 'nosuch'" in unknown.stderr


@pytest.mark.slow
def test_storage_faults_lose_no_image(store: ObjectStore, tmp_path: Path) -> None:
    for name, image in crops(200, size=(160, 120)):
        store_object(f"s3://images/faults/{name}.jpg", encode(image))
    keys = {"input.uri": "s3://images/faults", "output.uri": f"s3://results/{tmp_path.name}", **RANDOM}
    keys |= {"preprocess.image_size": "64", "output.commit_rows": "32"}
    arguments = [word for key, value in keys.items() for word in (f"--{key}", value)]
    with faulty_proxy(store.endpoint, Faults(unavailable=0.05, reset=0.02, stalled=0.01)) as proxy:
        names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
        done = run_command("jobs.infer", *arguments, timeout_s=250, **dict.fromkeys(names, proxy.endpoint))
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert (summary["num_ok"], summary["num_failed"]) == (200, 0)
    assert summary["num_retries"] > 0
    assert {"unavailable", "stalled"} < set(proxy.counts)
