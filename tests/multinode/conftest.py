"""Three workers, a head and an object store, each on a separate host, and the images that they process."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.local.digits import write_digits
from cluster.local.faulty_proxy import Faults, Proxy, faulty_proxy
from cluster.local.object_store import ObjectStore, object_store
from cluster.local.photographs import crops, encode
from cluster.local.processes import is_running
from pipelines.storage.bulk import store_object
from tests.multinode.hosts import Host, Network, can_create_hosts, network
from tests.multinode.ray_cluster import SETTINGS, RayCluster, start_cluster

STORE_PORTS = {"master": 9333, "volume": 8080, "filer": 8888, "s3": 8333}
BUCKETS = ("images", "results")
NUM_WORKERS, CPUS_PER_WORKER = 3, 1
ACCELERATOR = "accelerator_test"  # replaces a GPU
NUM_PHOTOGRAPHS = 320
DIGITS_URI = "s3://images/digits"
COLUMNS = f"{'job and fault':44}{'submissions':>12}{'wall time s':>13}{'time lost s':>13}{'fetched twice':>15}"
TABLE, RATES = pytest.StashKey[list[str]](), pytest.StashKey[list[str]]()


@dataclass
class Site:
    """Running cluster with its hosts, and the measurements of the tests.

    Attributes:
        network: Network of the hosts.
        cluster: Ray cluster with a head and `workers`.
        workers: Hosts that compute. The last one offers the accelerator.
        proxy: Proxy through which the hosts reach the store.
        lines: Lines of the table of faults.
        rates: Lines below the table.
        environment: Environment variables of the processes on the hosts.
        faultless_s: Wall time without faults in seconds, by job.
    """

    network: Network
    cluster: RayCluster
    workers: list[Host]
    proxy: Proxy
    lines: list[str]
    rates: list[str]
    environment: dict[str, str]
    faultless_s: dict[str, float]

    def restore(self) -> None:
        """Replace dead hosts, and restart Ray where it has ended."""
        for position, host in enumerate(self.workers):
            if not is_running(host.pid):
                self.workers[position] = self.network.add_host(f"{host.name}b", self.environment)
            if self.cluster.nodes[host.name].poll() is not None:
                self.add(self.workers[position])
        self.cluster.wait_for(*self.workers)

    def add(self, host: Host) -> None:
        """Start Ray on a host."""
        is_last = host is self.workers[-1]
        self.cluster.add_worker(host, CPUS_PER_WORKER, {ACCELERATOR: 1} if is_last else {})

    def measure(self, job: str, fault: str, num_images: int, run: Callable[[], int]) -> None:
        """Call `run`, which returns how often it submitted the job, and add a line to the table of faults."""
        self.proxy.fetched.clear()
        started = time.monotonic()
        num_submissions = run()
        wall_time_s = time.monotonic() - started
        lost_s = wall_time_s - self.faultless_s.setdefault(job, wall_time_s)
        fetched = sum(count for path, count in self.proxy.fetched.items() if path.startswith("/images/"))
        num_refetched = fetched - num_images
        name = f"{job}, {fault}"
        self.lines.append(f"{name:44}{num_submissions:>12}{wall_time_s:>13.1f}{lost_s:>13.1f}{num_refetched:>15}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of faults and the rates."""
    lines, rates = config.stash.get(TABLE, []), config.stash.get(RATES, [])
    if lines or rates:
        terminalreporter.section("several hosts")
        for line in [COLUMNS, *lines, *rates]:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def hosts_network(own_home: Path) -> Iterator[Network]:
    """Network of the hosts, which leaves nothing behind even if the tests are killed."""
    if not can_create_hosts():
        pytest.skip("hosts in network namespaces require root, iproute2 and util-linux")
    with tempfile.TemporaryDirectory(prefix="ecaray-") as folder, network(Path(folder)) as created:
        yield created


@pytest.fixture(scope="session")
def site_store(hosts_network: Network) -> Iterator[ObjectStore]:
    """Object store on a separate host. The standard AWS variables are set to reach it."""
    host = hosts_network.add_host("store", {})
    with object_store(BUCKETS, STORE_PORTS, host.address, host.command()) as running:
        os.environ.update(running.environment())
        yield running
        for name in running.environment():
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def site(
    hosts_network: Network,
    site_store: ObjectStore,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Site]:
    """Running cluster."""
    with faulty_proxy(site_store.endpoint, Faults(), hosts_network.outside) as proxy:
        environment = SETTINGS | site_store.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint}
        head = hosts_network.add_host("head", environment)
        workers = [hosts_network.add_host(f"worker{number}", environment) for number in range(NUM_WORKERS)]
        cluster = start_cluster(head, tmp_path_factory.mktemp("client"), tmp_path_factory.mktemp("nodes"))
        lines, rates = pytestconfig.stash.setdefault(TABLE, []), pytestconfig.stash.setdefault(RATES, [])
        running = Site(hosts_network, cluster, workers, proxy, lines, rates, environment, {})
        for host in workers:
            running.add(host)
        cluster.wait_for(*workers)
        yield running


@pytest.fixture(scope="session")
def input_uri(site_store: ObjectStore) -> str:
    """Prefix of photographs in the store."""
    for name, image in crops(NUM_PHOTOGRAPHS, size=(320, 240)):
        store_object(f"s3://images/site/{name}.jpg", encode(image))
    return "s3://images/site"


@pytest.fixture(scope="session")
def digits_uri(site_store: ObjectStore) -> str:
    """Prefix of `train` and `held-out`, with handwritten digits in one folder per class."""
    write_digits(f"{DIGITS_URI}/train", f"{DIGITS_URI}/held-out")
    return DIGITS_URI
