"""Faults of hosts and drivers while a job runs."""

import os
import signal
import time

from tests.multinode.conftest import Site
from tests.multinode.hosts import Host

LINK_DOWN_S = 30.0
ACTORS = {"jobs.infer": "PredictorActor", "jobs.train": "RayTrainWorker"}


def kill_worker(site: Site, job: str) -> None:
    """Kill a host that runs an actor of the job, as in a power failure."""
    find_host(site, job).kill()


def cut_link(site: Site, job: str) -> None:
    """Disconnect a host that runs an actor of the job from the network for `LINK_DOWN_S` seconds."""
    host = find_host(site, job)
    host.set_link(False)
    time.sleep(LINK_DOWN_S)
    host.set_link(True)


def find_host(site: Site, job: str) -> Host:
    """Return a host that runs an actor of the job."""
    return next(host for host in site.workers if any(ACTORS[job] in command for command in host.processes().values()))


def kill_driver(site: Site, job: str) -> None:
    """Kill the driver of the job on the head."""
    commands = site.cluster.head.processes().items()
    (driver,) = [
        pid for pid, command in commands if command.split(" ")[0].endswith("python") and f"-m {job} " in command
    ]
    os.kill(driver, signal.SIGKILL)


def stop_job(site: Site, job: str) -> None:
    """Stop the running job with `ray job stop` from the client."""
    (running,) = [entry for entry in site.cluster.list_state("jobs") if entry["status"] == "RUNNING"]
    site.cluster.client("stop", running["submission_id"])
