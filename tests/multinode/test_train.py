"""Training on several hosts with DDP yields the same losses as on one machine, even under faults."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.storage import uris
from pipelines.storage.filesystem import exists, read_bytes
from tests.multinode.conftest import Site
from tests.multinode.faults import cut_link, kill_driver, kill_worker
from tests.multinode.ray_cluster import JOB_TIMEOUT_S
from tests.support.infer import REPOSITORY

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]
NUM_EPOCHS, NUM_TRAIN, NUM_HELD_OUT = 1, 37 * 32, 599  # without the last incomplete batch
STEPS_PER_CHECKPOINT = 10


def train(digits_uri: str, output_uri: str) -> list[str]:
    keys: dict[str, Any] = {
        "data.train.uri": f"{digits_uri}/train",
        "data.validation.uri": f"{digits_uri}/held-out",
        "output.uri": output_uri,
        "optim.epochs": NUM_EPOCHS,
        "optim.warmup_epochs": 0,
        "checkpoint.every_steps": STEPS_PER_CHECKPOINT,
        "failure.max_failures": 3,
        "scaling.placement_strategy": "SPREAD",
        "logging.every_s": 1,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return ["jobs.train", "--config", "configs/train/digits.yaml", *words]


def history_of(output_uri: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(read_bytes(uris.join(output_uri, "_run.json")))["history"]
    return found


@pytest.fixture(scope="module")
def local_history(digits_uri: str) -> list[dict[str, Any]]:
    """History of the same job with two workers on a local Ray."""
    output_uri = "s3://results/train-alone"
    subprocess.run([sys.executable, "-m", *train(digits_uri, output_uri)], cwd=REPOSITORY, check=True, timeout=300)
    return history_of(output_uri)


def assert_equal_histories(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Check that the losses show the same images in the same order, each counted once."""
    assert [record["epoch"] for record in actual] == [record["epoch"] for record in expected]
    for wanted, found in zip(expected, actual, strict=True):
        assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
        assert found["top1"] == pytest.approx(wanted["top1"], abs=0.02)


def test_two_hosts_have_the_same_losses_as_one_machine(
    site: Site, digits_uri: str, local_history: list[dict[str, Any]]
) -> None:
    def run() -> int:
        summary = site.cluster.run_job(*train(digits_uri, "s3://results/train-site"), submission_id="train")
        assert summary["epochs"] == NUM_EPOCHS
        return 1

    site.measure("train", "no fault", NUM_EPOCHS * (NUM_TRAIN + NUM_HELD_OUT), run)
    assert_equal_histories(history_of("s3://results/train-site"), local_history)
    (job,) = [job["job_id"] for job in site.cluster.list_state("jobs") if job["submission_id"] == "train"]
    actors = site.cluster.list_state("actors", "--filter", f"job_id={job}")
    assert len({actor["node_id"] for actor in actors if actor["class_name"] == "RayTrainWorker"}) == 2


@pytest.mark.parametrize("fault", [kill_worker, cut_link, kill_driver])
def test_training_recovers_from_faults(
    fault: Callable[[Site, str], None], site: Site, digits_uri: str, local_history: list[dict[str, Any]]
) -> None:
    name = fault.__name__.replace("_", "-")
    output_uri = f"s3://results/train-{name}"

    def run() -> int:
        command = train(digits_uri, output_uri)
        with site.cluster.submit(*command, submission_id=f"train-{name}") as process:
            wait_for_checkpoint(output_uri, process)
            fault(site, "jobs.train")
            printed, _ = process.communicate(timeout=JOB_TIMEOUT_S)
        if fault is not kill_driver:
            assert process.returncode == 0, printed[-4000:]
            return 1
        assert process.returncode != 0
        site.cluster.run_job(*command, submission_id=f"train-{name}-again")
        return 2

    site.measure("train", name.replace("-", " "), NUM_EPOCHS * (NUM_TRAIN + NUM_HELD_OUT), run)
    assert_equal_histories(history_of(output_uri), local_history)
    site.restore()


def wait_for_checkpoint(output_uri: str, process: "subprocess.Popen[str]") -> None:
    """Wait until Ray Train has committed a checkpoint."""
    while not exists(uris.join(output_uri, "checkpoint_manager_snapshot.json")):
        assert process.poll() is None, "the job ended before the fault"
        time.sleep(0.2)
