"""Nodes of the Ray cluster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

from pipelines.runtime import ray_compat

# Resources that Ray defines itself, besides those with a colon in their names.
BUILT_IN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Node:
    """Resources that one machine offers to Ray.

    Attributes:
        num_cpus: Number of logical CPUs.
        num_gpus: Number of logical GPUs.
        resources: Amounts of custom resources by name.
        node_id: Ray's ID of the node, or None if Ray has not started.
        memory_bytes: Memory for worker processes in bytes, without Ray's object store.
    """

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    node_id: str | None = None
    memory_bytes: float = math.inf


def list_nodes() -> list[Node]:
    """Return the alive nodes that offer CPUs."""
    nodes = [_describe(node["Resources"], node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if node.num_cpus > 0]


def _describe(offer: Mapping[str, float], node_id: str) -> Node:
    custom = {name: count for name, count in offer.items() if name not in BUILT_IN_RESOURCES and ":" not in name}
    return Node(offer.get("CPU", 0), offer.get("GPU", 0), custom, node_id, offer.get("memory", math.inf))


def this_machine() -> Node:
    """Return the resources that Ray will offer if it is started on this machine."""
    memory_bytes = ray_compat.worker_memory_bytes()
    return Node(ray_compat.count_cpus(), ray_compat.count_visible_gpus(), memory_bytes=memory_bytes)


def can_grow() -> bool:
    """Return True if an autoscaler may add nodes to the cluster."""
    return ray_compat.has_autoscaler()
