"""What the cluster has, whether it can grow, and waiting until it has."""

import json
import logging
import time

import ray
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.utils import get_num_cpus
from ray.autoscaler.sdk import request_resources

from pipelines.config.sections import ComputeConfig
from pipelines.errors import RequestError
from pipelines.inference.plan import ComputePlan, Node, plan_compute

log = logging.getLogger(__name__)

POLL_S = 1.0
REPORT_EVERY_S = 5.0


def list_nodes() -> list[Node]:
    """The living nodes that offer CPUs."""
    offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(offer.get("CPU", 0), offer.get("GPU", 0)) for offer in offers if offer.get("CPU", 0) > 0]


def this_machine() -> Node:
    """What this machine's own Ray will offer, known before it starts."""
    gpus = get_accelerator_manager_for_resource("GPU")
    return Node(get_num_cpus(), gpus.get_current_node_num_accelerators() if gpus else 0)


def can_grow() -> bool:
    """Whether an autoscaler may add nodes to the cluster."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        return True
    # Autoscaler v1 reports in this key. Without one, a monitor that launches nothing reports there, under node types
    # that are made up from node ids.
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    node_types = (report.get("node_type_mapping") or {}).values()
    return any(not node_type.startswith("node_") for node_type in node_types)


def plan_for_cluster(config: ComputeConfig) -> ComputePlan:
    """The plan for the cluster at hand; where it can grow, for what it has to become, once it has become so.

    Raises:
        RequestError: the cluster can't grow, and what is asked for can't be scheduled on it.
    """
    if not can_grow():
        return plan_compute(config, list_nodes())
    wanted = _bundles_to_grow_to(config)
    started = last_report = time.monotonic()
    request_resources(bundles=wanted)
    try:
        while True:
            try:
                return plan_compute(config, list_nodes())
            except RequestError as reason:
                now = time.monotonic()
                if now - last_report >= REPORT_EVERY_S:
                    last_report = now
                    log.warning("waiting for the autoscaler, %.0f s so far: %s", now - started, reason)
            time.sleep(POLL_S)
    finally:
        request_resources(bundles=[])  # the running actors hold the nodes from here on


def _bundles_to_grow_to(config: ComputeConfig) -> list[dict[str, float]]:
    """One bundle a replica, and one for the tasks beside them."""
    replica = {"CPU": config.num_cpus_per_worker or 1.0}
    if config.use_gpu:
        replica["GPU"] = 1.0
    return [replica] * (config.num_workers or 1) + [{"CPU": 1.0}]
