"""Compute plan: divide the CPUs and GPUs of a cluster among the stages without a deadlock.

Ray schedules by the CPUs that tasks and actors declare. Replicas hold their CPUs for the whole run. If they held all of
them, no fetch, decode or write task could ever start, and the run would hang silently.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.config.sections import ComputeConfig
from pipelines.errors import RequestError
from pipelines.images.memory import DECODING_SHARE
from pipelines.runtime.nodes import Node


class _ReplicaNeeds(NamedTuple):
    """Needs of one replica on CPUs.

    Attributes:
        num_cpus: Number of CPUs, and of threads.
        fixed_bytes: Memory of torch and the weights.
        batch_bytes: Memory of the activations of a batch of `CPU_BATCH_SIZE`.
        is_batch_shared: True if all threads work on one batch, False if each has its own.
    """

    num_cpus: int
    fixed_bytes: float
    batch_bytes: float
    is_batch_shared: bool

    def num_bytes(self, batch_size: int) -> float:
        """Return the memory of a replica that uses all of its threads."""
        num_batches = 1 if self.is_batch_shared else self.num_cpus
        return self.fixed_bytes + num_batches * self.batch_bytes * batch_size / CPU_BATCH_SIZE

    def num_threads(self, num_bytes: float, batch_size: int) -> float:
        """Return the number of threads whose batches fit in `num_bytes`."""
        if self.is_batch_shared:
            return math.inf
        return (num_bytes - self.fixed_bytes) / (self.batch_bytes * batch_size / CPU_BATCH_SIZE)


# 16 is as fast as 32 (within 4 %) and takes half the memory.
CPU_BATCH_SIZE = 16
# Threads of a replica share the weights and the start-up cost, but more than a few contend for the GIL. The largest
# model measured, ecaresnet101d, takes 1.7 GB with two threads (0.2 GB of it for Winograd convolutions).
THREADED = _ReplicaNeeds(4, 1.1e9, 0.4e9, is_batch_shared=False)
# Compiled code holds the GIL, and threads that share its batch wait for whichever one a decode task preempts.
# ecaresnet101d takes 1.5 GB in int8.
COMPILED = _ReplicaNeeds(1, 1.35e9, 0.4e9, is_batch_shared=True)
SMALL_NODE_CPUS = 4
# One batch is computed while another is uploaded or downloaded.
BATCHES_PER_GPU = 2
GPU_BATCH_SIZE = 256
# Matrix products round the rows of a partial row block differently, which would make an image's result depend on its
# position in the batch.
CPU_BATCH_MULTIPLE = 8


@dataclass(frozen=True)
class ComputePlan:
    """Resources that each stage declares to Ray.

    Attributes:
        num_workers: Number of replicas that are requested at the start.
        min_workers: Number of replicas that have to be up before the run begins.
        num_cpus_per_worker: CPUs reserved for each replica.
        num_gpus_per_worker: GPUs reserved for each replica, 1 or 0.
        num_threads_per_worker: Number of batches that a replica processes concurrently; on CPUs, one core each.
        batch_size: Number of images per forward pass.
        num_cpus_per_decode_task: CPUs reserved for each fetch and decode task.
        num_cpus_per_write_task: CPUs reserved for each write task.
        resources_per_worker: Custom resources reserved for each replica.
        avoided_by_tasks: Ids of the nodes with accelerators, which run tasks only if no other node has free CPUs.
    """

    num_workers: int
    min_workers: int
    num_cpus_per_worker: float
    num_gpus_per_worker: int
    num_threads_per_worker: int
    batch_size: int
    num_cpus_per_decode_task: float
    num_cpus_per_write_task: float
    resources_per_worker: Mapping[str, float]
    avoided_by_tasks: tuple[str, ...]

    @property
    def num_threads(self) -> int:
        """Number of threads of all replicas together."""
        return self.num_workers * self.num_threads_per_worker


def plan_compute(
    config: ComputeConfig, nodes: list[Node], is_compiled: bool = False, may_grow: bool = False
) -> ComputePlan:
    """Divide the nodes among the stages.

    Replicas run on the nodes with GPUs, or with the custom resources that the config names. Tasks prefer the other
    nodes, if there are any, because a GPU needs the CPUs of its own node.

    Args:
        config: Section `compute` of the job.
        nodes: Nodes of the cluster.
        is_compiled: True if replicas on CPUs run compiled code.
        may_grow: True if the cluster may add nodes for replicas that do not fit yet.

    Raises:
        RequestError: The request does not fit these nodes. The message states what is required and what exists.
    """
    nodes = [node for node in nodes if node.num_cpus > 0]
    if not nodes:
        raise RequestError("the cluster has no CPUs: start a Ray node with num_cpus of 1 or more")
    needs = COMPILED if is_compiled else THREADED
    hosts = [(node, slots) for node in nodes if (slots := _default_replicas(node, config, needs))]
    num_default = sum(slots for _, slots in hosts)
    min_workers, max_workers = _requested_workers(config, num_default)
    _refuse_missing_resources(config, min_workers, nodes)
    others = [node for node in nodes if not _default_replicas(node, config, needs)]
    # On CPUs, replicas beyond the default number would only make each of them smaller.
    num_present = max_workers if config.use_gpu else max(min_workers, min(max_workers, num_default))
    cpus_each, threads = _plan_gpu(hosts) if config.use_gpu else _plan_cpu(config, hosts, num_present, needs, may_grow)
    if config.num_cpus_per_worker is not None:
        cpus_each = config.num_cpus_per_worker
    num_present = min(num_present, _count_slots(min_workers, cpus_each, config, nodes))
    total_cpus = sum(node.num_cpus for node in others or nodes)
    free_fraction = 1.0 if others else 1 - num_present * cpus_each / total_cpus
    # A task cannot use the CPUs of two nodes, so only the free CPUs of the largest one count.
    decode_cpus, write_cpus = _task_cpus(free_fraction * max(node.num_cpus for node in others or nodes))
    return ComputePlan(
        num_workers=max_workers if may_grow else num_present,
        min_workers=min_workers,
        num_cpus_per_worker=cpus_each,
        num_gpus_per_worker=int(config.use_gpu),
        num_threads_per_worker=threads,
        batch_size=_batch_size(config),
        num_cpus_per_decode_task=_round_down(decode_cpus),
        num_cpus_per_write_task=_round_down(write_cpus),
        resources_per_worker=config.resources_per_worker,
        avoided_by_tasks=tuple(node.node_id for node, _ in hosts if node.node_id) if others else (),
    )


def _task_cpus(free_cpus: float) -> tuple[float, float]:
    """Return the CPUs of a decode task and of a write task, given the CPUs that replicas leave free."""
    # Tasks get a whole CPU if there are plenty. On small machines, exactly two tasks fit next to the replicas, one of
    # each kind or two write tasks: starting a third process would cost more than it saves.
    return min(1.0, free_cpus * 0.65), min(1.0, free_cpus * 0.35)


def _batch_size(config: ComputeConfig) -> int:
    if config.use_gpu:
        return config.batch_size or GPU_BATCH_SIZE
    return math.ceil((config.batch_size or CPU_BATCH_SIZE) / CPU_BATCH_MULTIPLE) * CPU_BATCH_MULTIPLE


def _requested_workers(config: ComputeConfig, num_default: int) -> tuple[int, int]:
    """Return the minimum and maximum number of replicas."""
    if isinstance(config.num_workers, tuple):
        return config.num_workers
    num_workers = config.num_workers or max(1, num_default)
    return num_workers, num_workers


def _default_replicas(node: Node, config: ComputeConfig, needs: _ReplicaNeeds) -> int:
    """Return the default number of replicas on a node; 0 if it lacks the resources for one."""
    max_replicas = _max_replicas(node, config)
    if config.use_gpu:
        return max_replicas
    num_in_memory = _replica_bytes(node) / needs.num_bytes(_batch_size(config))
    return min(max_replicas, max(1, int(min(node.num_cpus // needs.num_cpus, num_in_memory))))


def _plan_cpu(
    config: ComputeConfig, hosts: list[tuple[Node, int]], num_workers: int, needs: _ReplicaNeeds, may_grow: bool
) -> tuple[float, int]:
    """Return the CPUs and the threads of each replica, without GPUs."""
    nodes = [node for node, _ in hosts]
    cpus_by_node = [_replica_fraction(node) * node.num_cpus / slots for node, slots in hosts]
    threads = min(_num_threads(node, slots, needs, _batch_size(config)) for node, slots in hosts)
    crowding = max(1.0, num_workers / sum(slots for _, slots in hosts))
    total_cpus = sum(node.num_cpus for node in nodes)
    if num_workers > max(1, total_cpus):
        raise RequestError(
            f"compute.num_workers = {num_workers}, but the cluster has {total_cpus:g} CPUs and each replica needs at "
            "least one: lower compute.num_workers"
        )
    threads = config.num_threads_per_worker or max(1, int(threads / crowding))
    cpus_each = _round_down(min(cpus_by_node) / math.ceil(crowding))
    # Ray may restart the replicas of one node on another one.
    may_move = (len(nodes) > 1 or may_grow) and crowding == 1 and not config.resources_per_worker
    return _leave_room_after_move(cpus_each, nodes, config, needs) if may_move else cpus_each, threads


def _num_threads(node: Node, num_replicas: int, needs: _ReplicaNeeds, batch_size: int) -> int:
    """Return the threads of each replica on a node: one per core, as far as the batches fit in memory."""
    num_in_memory = needs.num_threads(_replica_bytes(node) / num_replicas, batch_size)
    return max(1, int(min(node.num_cpus // num_replicas, num_in_memory)))


def _replica_bytes(node: Node) -> float:
    """Return the memory of a node that replicas may use; the rest is for decoding."""
    return node.memory_bytes * (1 - DECODING_SHARE)


def _leave_room_after_move(cpus_each: float, nodes: list[Node], config: ComputeConfig, needs: _ReplicaNeeds) -> float:
    """Increase the CPUs per replica until a node keeps CPUs for tasks even if replicas of other nodes move to it.

    Ray restarts the replicas of a lost node wherever they fit, and also places those that wait for a new node there. If
    they filled up the nodes, no task could start any more, and the run would hang.
    """
    counts = [_default_replicas(node, config, needs) for node in nodes]
    increased = cpus_each
    while all(count * increased < node.num_cpus for node, count in zip(nodes, counts)):
        if not any(_may_fill_up(increased, node, count) for node, count in zip(nodes, counts)):
            return increased
        increased += 0.01
    return cpus_each  # nodes differ in size, and no value suits all of them


def _may_fill_up(cpus_each: float, node: Node, num_planned: int) -> bool:
    """Return whether the replicas that fit on a node could take the CPUs that the plan leaves for tasks."""
    min_free_cpus = node.num_cpus - _num_fitting(node.num_cpus, cpus_each) * cpus_each
    planned_free_cpus = node.num_cpus - num_planned * cpus_each
    return min_free_cpus < sum(_task_cpus(planned_free_cpus)) - 1e-6


def _plan_gpu(hosts: list[tuple[Node, int]]) -> tuple[float, int]:
    """Return the CPUs and the threads of each replica, with one GPU each."""
    # The Python thread of a replica that feeds the GPU needs one CPU, or less on nodes with few CPUs per GPU.
    return _round_down(min(1.0, *(node.num_cpus / node.num_gpus / 2 for node, _ in hosts))), BATCHES_PER_GPU


def _replica_fraction(node: Node) -> float:
    """Return the fraction of a node's CPUs that replicas take."""
    return 0.5 if node.num_cpus < SMALL_NODE_CPUS else 0.75


def _refuse_missing_resources(config: ComputeConfig, num_workers: int, nodes: list[Node]) -> None:
    if config.use_gpu and num_workers > (num_gpus := sum(int(node.num_gpus) for node in nodes)):
        raise RequestError(
            f"compute.use_gpu asks for {num_workers} GPUs, one per replica, but the cluster has {num_gpus}: lower "
            "compute.num_workers or add GPU nodes"
        )
    for name, amount in config.resources_per_worker.items():
        available = [node.resources.get(name, 0) for node in nodes]
        if num_workers > sum(_num_fitting(offer, amount) for offer in available):
            raise RequestError(
                f"compute.resources_per_worker asks for {amount:g} {name} for each of {num_workers} replicas, but "
                f"the cluster has {sum(available):g}: lower compute.num_workers or add nodes with {name}"
            )


def _num_fitting(available: float, amount: float) -> int:
    """Return how many times an amount of a resource fits in what a node has."""
    return int(available / amount + 1e-6)


def _count_slots(num_workers: int, cpus_each: float, config: ComputeConfig, nodes: list[Node]) -> int:
    """Return the number of replicas that fit on the nodes.

    Raises:
        RequestError: Fewer than `num_workers` fit, or they would leave no CPUs for tasks.
    """
    total_cpus = sum(node.num_cpus for node in nodes)
    num_slots = sum(min(_num_fitting(node.num_cpus, cpus_each), _max_replicas(node, config)) for node in nodes)
    if num_workers > num_slots or num_workers * cpus_each >= total_cpus:
        raise RequestError(
            f"{num_workers} replicas with {cpus_each:g} CPUs each, plus CPUs for fetching, decoding and writing, do "
            f"not fit the cluster's {total_cpus:g} CPUs on {len(nodes)} nodes: lower compute.num_workers or "
            "compute.num_cpus_per_worker"
        )
    return num_slots


def _max_replicas(node: Node, config: ComputeConfig) -> int:
    """Return the number of replicas that the GPUs or CPUs and the custom resources of a node allow."""
    slots = int(node.num_gpus) if config.use_gpu else max(1, int(node.num_cpus))
    custom = config.resources_per_worker.items()
    return min([slots, *(_num_fitting(node.resources.get(name, 0), amount) for name, amount in custom)])


def _round_down(num_cpus: float) -> float:
    """Round down to 1/100 CPU. Ray counts in steps of 1/10,000."""
    return max(0.01, math.floor(num_cpus * 100) / 100)
