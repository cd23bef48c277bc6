"""Observed job: the hosts of its stages, its Prometheus metrics, and its progress file."""

import json
import re
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass

import pytest

from pipelines.outputs import run_record
from pipelines.runtime.metrics import COUNTERS
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, read_bytes
from tests.multinode.conftest import ACCELERATOR, NUM_PHOTOGRAPHS, Site
from tests.multinode.ray_cluster import METRICS_PORT
from tests.multinode.test_infer import infer

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]
OUTPUT_URI, SUBMISSION_ID = "s3://results/watched", "watched"
PROGRESS_URI = uris.join(OUTPUT_URI, run_record.PROGRESS_FILE)
SAMPLE = re.compile(r"^ray_(ecaray_\w+)_total\{(.*)\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Watched:
    """Observations of a job.

    Attributes:
        samples: Values of counters that changed while it ran, by host, name and tags.
        progress: Successive contents of its `_progress.json`.
    """

    samples: dict[tuple[str, str, str], float]
    progress: list[bytes]


def scrape(site: Site) -> dict[tuple[str, str, str], float]:
    """Return the values of counters by host, name and tags."""
    found: dict[tuple[str, str, str], float] = {}
    for host in site.workers:
        with urllib.request.urlopen(f"http://{host.address}:{METRICS_PORT}/metrics", timeout=10) as response:
            for name, tags, value in SAMPLE.findall(response.read().decode()):
                found[host.name, name, tags] = float(value)
    return found


@pytest.fixture(scope="module")
def watched(site: Site, input_uri: str) -> Watched:
    """Job whose replicas require the accelerator, on three hosts of which one offers it."""
    command = [*infer(input_uri, OUTPUT_URI), "--compute.resources_per_worker", json.dumps({ACCELERATOR: 1})]
    before, progress = scrape(site), list[bytes]()
    seen = dict(before)
    with site.cluster.submit(*command, submission_id=SUBMISSION_ID) as process:
        while process.poll() is None:
            seen |= scrape(site)
            progress += [read_bytes(PROGRESS_URI)] if exists(PROGRESS_URI) else []
            time.sleep(1)
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return Watched({key: value for key, value in seen.items() if value != before.get(key)}, progress)


def test_every_counter_is_exported(watched: Watched) -> None:
    # No request was retried.
    assert {name for _, name, _ in watched.samples} == COUNTERS.keys() - {"ecaray_requests_sent_again"}
    images = sum(value for (_, name, _), value in watched.samples.items() if name == "ecaray_images")
    assert 0 < images <= NUM_PHOTOGRAPHS
    tags = [tags for _, name, tags in watched.samples if name == "ecaray_stage_seconds"]
    assert {re.findall(r'stage="(\w+)"', tag)[0] for tag in tags} == {"fetch", "decode", "forward", "write"}


def test_progress_file_shows_a_running_and_a_finished_job(watched: Watched) -> None:
    assert any(json.loads(content)["is_running"] for content in watched.progress)
    last = json.loads(read_bytes(PROGRESS_URI))
    assert (last["is_running"], last["num_ok"]) == (False, NUM_PHOTOGRAPHS)


def test_replicas_run_on_the_accelerator_host_and_tasks_prefer_other_hosts(watched: Watched, site: Site) -> None:
    (job,) = [job["job_id"] for job in site.cluster.list_state("jobs") if job["submission_id"] == SUBMISSION_ID]
    addresses = {node["node_id"]: node["node_ip"] for node in site.cluster.list_state("nodes")}
    hosts = {stage: Counter[str]() for stage in ("FetchTask", "PredictorActor", "PartWriter")}
    for task in site.cluster.list_state("tasks", "--filter", f"job_id={job}"):
        for stage in hosts:
            if stage in task["name"] and task["node_id"]:
                hosts[stage][addresses[task["node_id"]]] += 1
    accelerated = site.workers[-1].address
    assert hosts["PredictorActor"].keys() == {accelerated}
    # A task may run there while the other hosts have no room. By default, Ray would place a third of the writers there.
    for stage in ("FetchTask", "PartWriter"):
        assert hosts[stage][accelerated] < hosts[stage].total() / 4
