"""Labelling on several hosts yields the same rows as on one machine, even under faults."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from pipelines.outputs.file_names import list_files
from tests.multinode.conftest import NUM_PHOTOGRAPHS, Site
from tests.multinode.faults import cut_link, kill_driver, kill_worker, stop_job
from tests.multinode.ray_cluster import JOB_TIMEOUT_S
from tests.support.infer import REPOSITORY, read_kind

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]
COMMIT_ROWS = 16
FAULTS = [kill_worker, cut_link, kill_driver, pytest.param(stop_job, marks=pytest.mark.slow)]


def infer(input_uri: str, output_uri: str) -> list[str]:
    keys = {"input.uri": input_uri, "output.uri": output_uri, "model.name": "ecaresnet26t", "model.weights": "random"}
    keys |= {"output.commit_rows": str(COMMIT_ROWS)}
    return ["jobs.infer", *[word for key, value in keys.items() for word in (f"--{key}", value)]]


@pytest.fixture(scope="module")
def local_output(input_uri: str) -> str:
    """Output of the same job on a local Ray."""
    output_uri = "s3://results/alone"
    subprocess.run([sys.executable, "-m", *infer(input_uri, output_uri)], cwd=REPOSITORY, check=True, timeout=200)
    return output_uri


def test_submitted_job_writes_the_same_rows_as_one_machine(site: Site, input_uri: str, local_output: str) -> None:
    command = infer(input_uri, "s3://results/site")

    def run() -> int:
        assert site.cluster.run_job(*command, submission_id="infer")["num_ok"] == NUM_PHOTOGRAPHS
        return 1

    site.measure("infer", "no fault", NUM_PHOTOGRAPHS, run)
    assert read_kind("s3://results/site", "part").equals(read_kind(local_output, "part"))
    again = site.cluster.run_job(*command, submission_id="infer-again")
    assert again["num_resumed"] == NUM_PHOTOGRAPHS


@pytest.mark.parametrize("fault", FAULTS)
def test_no_rows_are_lost_or_duplicated_under_faults(
    fault: Callable[[Site, str], None], site: Site, input_uri: str, local_output: str
) -> None:
    name = fault.__name__.replace("_", "-")
    output_uri = f"s3://results/infer-{name}"

    def run() -> int:
        command = infer(input_uri, output_uri)
        with site.cluster.submit(*command, submission_id=f"infer-{name}") as process:
            wait_for_files(output_uri, process)
            fault(site, "jobs.infer")
            printed, _ = process.communicate(timeout=JOB_TIMEOUT_S)
        if fault not in (kill_driver, stop_job):
            assert process.returncode == 0, printed[-4000:]
            return 1
        (job,) = [job for job in site.cluster.list_state("jobs") if job["submission_id"] == f"infer-{name}"]
        assert job["status"] == ("STOPPED" if fault is stop_job else "FAILED")
        summary = site.cluster.run_job(*command, submission_id=f"infer-{name}-again")
        assert summary["num_resumed"] >= COMMIT_ROWS
        return 2

    site.measure("infer", name.replace("-", " "), NUM_PHOTOGRAPHS, run)
    assert read_kind(output_uri, "part").equals(read_kind(local_output, "part"))
    site.restore()


def wait_for_files(output_uri: str, process: "subprocess.Popen[str]") -> None:
    """Wait until the first files exist."""
    while len(list_files(output_uri)) < 3:
        assert process.poll() is None, "the job ended before the fault"
        time.sleep(0.2)
