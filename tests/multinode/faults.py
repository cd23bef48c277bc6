"""What happens to hosts while a job runs."""

import os
import signal
import time

from tests.multinode.conftest import Site

LINK_DOWN_S = 30.0


def kill_worker(site: Site, job: str) -> None:
    """The power of a worker's host is cut."""
    site.workers[0].kill()


def cut_link(site: Site, job: str) -> None:
    """A worker's host is off the network for 30 s."""
    site.workers[1].set_link(False)
    time.sleep(LINK_DOWN_S)
    site.workers[1].set_link(True)


def kill_driver(site: Site, job: str) -> None:
    """SIGKILL for the process that runs the job's script, on the head."""
    commands = site.cluster.head.processes().items()
    (driver,) = [
        pid for pid, command in commands if command.split(" ")[0].endswith("python") and f"-m {job} " in command
    ]
    os.kill(driver, signal.SIGKILL)
