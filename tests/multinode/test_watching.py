"""A job that is watched: where its stages run, and what Prometheus and its output say meanwhile."""

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
    """What was seen of a job.

    Attributes:
        samples: counters that changed while it ran, by host, name and tags.
        progress: each state of its `_progress.json`.
    """

    samples: dict[tuple[str, str, str], float]
    progress: list[bytes]


def scrape(site: Site) -> dict[tuple[str, str, str], float]:
    """Value by host, name and tags."""
    found: dict[tuple[str, str, str], float] = {}
    for host in site.workers:
        with urllib.request.urlopen(f"http://{host.address}:{METRICS_PORT}/metrics", timeout=10) as answer:
            for name, tags, value in SAMPLE.findall(answer.read().decode()):
                found[host.name, name, tags] = float(value)
    return found


@pytest.fixture(scope="module")
def watched(site: Site, input_uri: str) -> Watched:
    """A job whose replicas want the accelerator, on three hosts of which one offers it."""
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
    # Those of a store's bad day are missing on a good one.
    assert {name for _, name, _ in watched.samples} == COUNTERS.keys() - {"ecaray_requests_sent_again"}
    images = sum(value for (_, name, _), value in watched.samples.items() if name == "ecaray_images")
    assert 0 < images <= NUM_PHOTOGRAPHS
    tags = [tags for _, name, tags in watched.samples if name == "ecaray_stage_seconds"]
    assert {re.findall(r'stage="(\w+)"', tag)[0] for tag in tags} == {"fetch", "decode", "forward", "write"}


def test_progress_is_there_while_the_job_runs_and_says_when_it_is_over(watched: Watched) -> None:
    assert any(json.loads(content)["is_running"] for content in watched.progress)
    last = json.loads(read_bytes(PROGRESS_URI))
    assert (last["is_running"], last["num_ok"]) == (False, NUM_PHOTOGRAPHS)


def test_replicas_run_on_the_accelerator_and_tasks_first_on_the_other_hosts(watched: Watched, site: Site) -> None:
    (job,) = [job["job_id"] for job in site.cluster.listed("jobs") if job["submission_id"] == SUBMISSION_ID]
    addresses = {node["node_id"]: node["node_ip"] for node in site.cluster.listed("nodes")}
    hosts = {stage: Counter[str]() for stage in ("FetchTask", "PredictorActor", "PartWriter")}
    for task in site.cluster.listed("tasks", "--filter", f"job_id={job}"):
        for stage in hosts:
            if stage in task["name"] and task["node_id"]:
                hosts[stage][addresses[task["node_id"]]] += 1
    accelerated = site.workers[-1].address
    assert hosts["PredictorActor"].keys() == {accelerated}
    # One for which the others have no room at a moment may run there. Left to Ray, a third of the writers do.
    for stage in ("FetchTask", "PartWriter"):
        assert hosts[stage][accelerated] < hosts[stage].total() / 4
