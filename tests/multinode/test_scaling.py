"""Rate on one, two and three worker hosts.

The hosts share the cores of this machine. The rates therefore show the overhead of more processes, more copies and the
bridge, but not the speed-up of more hardware.
"""

import pytest

from tests.multinode.conftest import Site
from tests.multinode.test_infer import infer

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.timeout(900)]


def test_rates_on_one_to_three_hosts(site: Site, input_uri: str) -> None:
    try:
        for count in (3, 2, 1):
            for host in site.workers[count:]:
                if site.cluster.nodes[host.name].poll() is None:
                    site.cluster.remove_worker(host)
            site.cluster.wait_for(*site.workers[:count])
            name = f"hosts-{count}"
            summary = site.cluster.run_job(*infer(input_uri, f"s3://results/{name}"), submission_id=name)
            assert summary["num_failed"] == 0
            site.rates.append(f"{count} worker hosts: {summary['images_per_s']:.1f} images/s with start-up")
    finally:
        site.restore()
