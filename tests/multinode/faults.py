"""What happens to hosts while a job runs."""

import os
import signal
import time

from tests.multinode.conftest import Site
from tests.multinode.hosts import Host

LINK_DOWN_S = 30.0
ACTORS = {"jobs.infer": "PredictorActor", "jobs.train": "RayTrainWorker"}


def kill_worker(site: Site, job: str) -> None:
    """The power of a host at work is cut."""
    find_host(site, job).kill()


def cut_link(site: Site, job: str) -> None:
    """A host at work is off the network for 30 s."""
    host = find_host(site, job)
    host.set_link(False)
    time.sleep(LINK_DOWN_S)
    host.set_link(True)


def find_host(site: Site, job: str) -> Host:
    """One on which an actor of the job runs."""
    return next(host for host in site.workers if any(ACTORS[job] in command for command in host.processes().values()))


def kill_driver(site: Site, job: str) -> None:
    """SIGKILL for the process that runs the job's script, on the head."""
    commands = site.cluster.head.processes().items()
    (driver,) = [
        pid for pid, command in commands if command.split(" ")[0].endswith("python") and f"-m {job} " in command
    ]
    os.kill(driver, signal.SIGKILL)


def stop_job(site: Site, job: str) -> None:
    """`ray job stop`, from outside."""
    (running,) = [entry for entry in site.cluster.listed("jobs") if entry["status"] == "RUNNING"]
    site.cluster.client("stop", running["submission_id"])
