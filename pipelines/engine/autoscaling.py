"""The plan for the cluster at hand, and waiting for one that grows."""

import logging
import time

from ray.autoscaler.sdk import request_resources

from pipelines.config.sections import ComputeConfig
from pipelines.engine.plan import ComputePlan, plan_compute
from pipelines.errors import RequestError
from pipelines.runtime.nodes import can_grow, list_nodes

log = logging.getLogger(__name__)

POLL_S = 1.0
REPORT_EVERY_S = 5.0


def plan_for_cluster(config: ComputeConfig, is_compiled: bool = False) -> ComputePlan:
    """The plan for the cluster at hand; where it can grow, for what it has to become, once it has become so.

    Raises:
        RequestError: the cluster can't grow, and what is asked for can't be scheduled on it.
    """
    if not can_grow():
        return plan_compute(config, list_nodes(), is_compiled)
    wanted = _bundles_to_grow_to(config)
    started = last_report = time.monotonic()
    request_resources(bundles=wanted)
    try:
        while True:
            try:
                return plan_compute(config, list_nodes(), is_compiled, may_grow=True)
            except RequestError as reason:
                now = time.monotonic()
                if now - last_report >= REPORT_EVERY_S:
                    last_report = now
                    log.warning("waiting for the autoscaler, %.0f s so far: %s", now - started, reason)
            time.sleep(POLL_S)
    finally:
        request_resources(bundles=[])  # the running actors hold the nodes from here on


def _bundles_to_grow_to(config: ComputeConfig) -> list[dict[str, float]]:
    """One bundle a replica, the most of them, and one for the tasks beside them."""
    replica = {"CPU": config.num_cpus_per_worker or 1.0, **config.resources_per_worker}
    if config.use_gpu:
        replica["GPU"] = 1.0
    most = config.num_workers[1] if isinstance(config.num_workers, tuple) else config.num_workers or 1
    return [replica] * most + [{"CPU": 1.0}]
