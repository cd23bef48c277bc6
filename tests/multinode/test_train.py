"""Training on several hosts, DDP over the bridge: what one machine learns, whatever happens to the hosts."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.storage import uris
from pipelines.storage.filesystem import is_there, read_bytes
from tests.multinode.conftest import Site
from tests.multinode.faults import cut_link, kill_driver, kill_worker
from tests.support.infer import REPOSITORY, summary_of

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]
NUM_EPOCHS, NUM_TRAIN, NUM_HELD_OUT = 2, 1198, 599
STEPS_PER_CHECKPOINT = 5


def train(digits_uri: str, output_uri: str) -> list[str]:
    keys: dict[str, Any] = {
        "data.train.uri": f"{digits_uri}/train",
        "data.validation.uri": f"{digits_uri}/held-out",
        "output.uri": output_uri,
        "optim.epochs": NUM_EPOCHS,
        "optim.warmup_epochs": 0,
        "checkpoint.every_steps": STEPS_PER_CHECKPOINT,
        "failure.max_failures": 3,
        "logging.every_s": 1,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return ["jobs.train", "--config", "configs/train/digits.yaml", *words]


def history_of(output_uri: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(read_bytes(uris.join(output_uri, "_run.json")))["history"]
    return found


@pytest.fixture(scope="module")
def alone(digits_uri: str) -> dict[str, Any]:
    """The summary of the same job on this machine's own Ray, two workers too."""
    command = [sys.executable, "-m", *train(digits_uri, "s3://results/train-alone")]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    return summary_of(done.stdout)


def test_two_hosts_learn_what_one_machine_learns(site: Site, digits_uri: str, alone: dict[str, Any]) -> None:
    def run() -> int:
        summary = site.cluster.run_job(*train(digits_uri, "s3://results/train-site"), submission_id="train")
        assert summary["epochs"] == NUM_EPOCHS
        return 1

    site.measure("train", "undisturbed", NUM_EPOCHS * (NUM_TRAIN + NUM_HELD_OUT), run)
    for here, there in zip(history_of("s3://results/train-alone"), history_of("s3://results/train-site"), strict=True):
        assert there["train_loss"] == pytest.approx(here["train_loss"], rel=1e-3)
        assert there["top1"] == pytest.approx(here["top1"], abs=0.01)


@pytest.mark.parametrize("fault", [kill_worker, cut_link, kill_driver])
def test_training_goes_on(
    fault: Callable[[Site, str], None], site: Site, digits_uri: str, alone: dict[str, Any]
) -> None:
    name = fault.__name__.replace("_", "-")
    output_uri = f"s3://results/train-{name}"

    def run() -> int:
        command = train(digits_uri, output_uri)
        with site.cluster.submit(*command, submission_id=f"train-{name}") as process:
            wait_for_checkpoint(output_uri, process)
            fault(site, "jobs.train")
            printed, _ = process.communicate(timeout=300)
        if fault is not kill_driver:
            assert process.returncode == 0, printed[-4000:]
            return 1
        assert process.returncode != 0
        site.cluster.run_job(*command, submission_id=f"train-{name}-again")
        return 2

    site.measure("train", name.replace("-", " "), NUM_EPOCHS * (NUM_TRAIN + NUM_HELD_OUT), run)
    history = history_of(output_uri)
    assert [record["epoch"] for record in history] == [1, 2]
    assert history[-1]["top1"] == pytest.approx(alone["top1"], abs=0.03)
    site.restore()


def wait_for_checkpoint(output_uri: str, process: "subprocess.Popen[str]") -> None:
    """Until Ray Train has committed one."""
    while not is_there(uris.join(output_uri, "checkpoint_manager_snapshot.json")):
        assert process.poll() is None, "the job ended before the fault"
        time.sleep(0.2)
