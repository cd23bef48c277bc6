"""Compute plan for the connected cluster, including clusters that have to scale up first."""

import logging
import time

from ray.autoscaler.sdk import request_resources

from pipelines.config.sections import ComputeConfig
from pipelines.engine.plan import ComputePlan, plan_compute
from pipelines.errors import RequestError
from pipelines.runtime.nodes import can_grow, list_nodes

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
REPORT_INTERVAL_S = 5.0


def plan_for_cluster(config: ComputeConfig, is_compiled: bool = False) -> ComputePlan:
    """Plan the compute of a job for the connected cluster.

    If the cluster has an autoscaler, request the nodes that the job needs and wait until a plan fits.

    Args:
        config: Section `compute` of the job.
        is_compiled: True if replicas on CPUs run compiled code.

    Raises:
        RequestError: The job cannot be scheduled on the cluster, and the cluster cannot scale up.
    """
    if not can_grow():
        return plan_compute(config, list_nodes(), is_compiled)
    started = last_report = time.monotonic()
    request_resources(bundles=_required_bundles(config))
    try:
        while True:
            try:
                return plan_compute(config, list_nodes(), is_compiled, may_grow=True)
            except RequestError as reason:
                now = time.monotonic()
                if now - last_report >= REPORT_INTERVAL_S:
                    last_report = now
                    log.warning("waiting for the autoscaler, %.0f s so far: %s", now - started, reason)
            time.sleep(POLL_INTERVAL_S)
    finally:
        request_resources(bundles=[])  # from here on, the running actors keep the nodes alive


def _required_bundles(config: ComputeConfig) -> list[dict[str, float]]:
    """Return one resource bundle for each replica, up to the maximum, and one for the tasks."""
    replica = {"CPU": config.num_cpus_per_worker or 1.0, **config.resources_per_worker}
    if config.use_gpu:
        replica["GPU"] = 1.0
    max_workers = config.num_workers[1] if isinstance(config.num_workers, tuple) else config.num_workers or 1
    return [replica] * max_workers + [{"CPU": 1.0}]
