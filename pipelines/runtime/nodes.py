"""The machines that Ray has, and whether it can get more."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray
from ray._common.utils import get_system_memory
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
from ray._private.utils import get_num_cpus

# Ray's own; so are those with a colon in their names.
OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Node:
    """What one machine offers to Ray.

    Attributes:
        num_cpus: logical CPUs.
        num_gpus: logical GPUs.
        resources: custom ones, by name.
        node_id: Ray's, where Ray is up.
        memory_bytes: for processes; Ray's object store is beside it.
    """

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    node_id: str | None = None
    memory_bytes: float = math.inf


def list_nodes() -> list[Node]:
    """The living nodes that offer CPUs."""
    nodes = [_describe(node["Resources"], node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if node.num_cpus > 0]


def _describe(offer: Mapping[str, float], node_id: str) -> Node:
    custom = {name: count for name, count in offer.items() if name not in OWN_RESOURCES and ":" not in name}
    return Node(offer.get("CPU", 0), offer.get("GPU", 0), custom, node_id, offer.get("memory", math.inf))


def this_machine() -> Node:
    """What this machine's own Ray will offer, known before it starts."""
    gpus = get_accelerator_manager_for_resource("GPU")
    num_gpus = gpus.get_current_node_num_accelerators() if gpus else 0
    visible = gpus.get_current_process_visible_accelerator_ids() if gpus else None
    if visible is not None:  # CUDA_VISIBLE_DEVICES is set
        num_gpus = min(num_gpus, len(visible))
    memory_bytes = get_system_memory() * (1 - DEFAULT_OBJECT_STORE_MEMORY_PROPORTION)
    return Node(get_num_cpus(), num_gpus, memory_bytes=memory_bytes)


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
