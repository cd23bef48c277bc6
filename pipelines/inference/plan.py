"""Plan CPUs, GPUs and threads from what the cluster has, so that no stage waits for ever for another's CPUs.

Ray schedules by the CPUs that tasks and actors declare. Replicas hold theirs for the whole run: were they to hold all,
no fetch, decode or write task could start, and the run would stand still without a word.
"""

import math
from dataclasses import dataclass

from pipelines.config.sections import ComputeConfig
from pipelines.errors import RequestError
from pipelines.nodes import Node

# Threads share the weights and the start-up; beyond a few, Python's lock comes between them.
CPUS_PER_REPLICA = 4
# Compiled code holds that lock, and threads that share its batch wait for the one that gives way to a decoding task.
CPUS_PER_COMPILED_REPLICA = 1
SMALL_NODE_CPUS = 4
CPU_BATCH_SIZE = 16  # as fast as 32 (within 4 %), and half the memory: about 150 MB of activations a thread
GPU_BATCH_SIZE = 256
# Matrix products round the rows of an incomplete block of rows in another way: an image would depend on its place.
CPU_BATCH_MULTIPLE = 8


@dataclass(frozen=True)
class ComputePlan:
    """What each stage declares to Ray.

    Attributes:
        num_workers: replicas.
        num_cpus_per_worker: set aside for each replica.
        num_gpus_per_worker: 1 or 0.
        num_threads_per_worker: batches that a replica predicts at the same time, each on one core.
        batch_size: images per forward pass.
        num_cpus_per_decode_task: set aside for each fetching and decoding task.
        num_cpus_per_write_task: set aside for each writing task.
    """

    num_workers: int
    num_cpus_per_worker: float
    num_gpus_per_worker: int
    num_threads_per_worker: int
    batch_size: int
    num_cpus_per_decode_task: float
    num_cpus_per_write_task: float


def plan_compute(config: ComputeConfig, nodes: list[Node], is_compiled: bool = False) -> ComputePlan:
    """Share the nodes among the stages.

    Args:
        config: what the user asked for.
        nodes: the machines of a cluster, or those it may grow to.
        is_compiled: whether replicas on CPUs run compiled code.

    Raises:
        RequestError: it cannot be scheduled on these nodes; says what is wanted and what there is.
    """
    working = [node for node in nodes if node.num_cpus > 0]
    if not working:
        raise RequestError("the cluster has no CPUs")
    per_replica = CPUS_PER_COMPILED_REPLICA if is_compiled else CPUS_PER_REPLICA
    num_workers, cpus_each, threads = (
        _plan_gpu(config, working) if config.use_gpu else _plan_cpu(config, working, per_replica)
    )
    if config.num_cpus_per_worker is not None:
        cpus_each = config.num_cpus_per_worker
    _refuse_if_too_many(num_workers, cpus_each, config.use_gpu, working)
    total_cpus = sum(node.num_cpus for node in working)
    share_left = 1 - num_workers * cpus_each / total_cpus
    left = share_left * max(node.num_cpus for node in working)  # on one node: a task can't use two
    return ComputePlan(
        num_workers=num_workers,
        num_cpus_per_worker=cpus_each,
        num_gpus_per_worker=int(config.use_gpu),
        num_threads_per_worker=threads,
        batch_size=_batch_size(config),
        # A whole CPU where there are plenty. On small machines one task of each kind fits beside the replicas, and no
        # second one: starting its process would cost more than it ever saves.
        num_cpus_per_decode_task=_round_down(min(1.0, left * 3 / 4)),
        num_cpus_per_write_task=_round_down(min(1.0, left / 4)),
    )


def _batch_size(config: ComputeConfig) -> int:
    if config.use_gpu:
        return config.batch_size or GPU_BATCH_SIZE
    return math.ceil((config.batch_size or CPU_BATCH_SIZE) / CPU_BATCH_MULTIPLE) * CPU_BATCH_MULTIPLE


def _plan_cpu(config: ComputeConfig, nodes: list[Node], per_replica: int) -> tuple[int, float, int]:
    """Replicas, CPUs each, threads each, without GPUs."""
    per_node = [_replicas_of(node, per_replica) for node in nodes]
    shares = [_replica_share(node) * node.num_cpus / count for node, count in zip(nodes, per_node)]
    threads = min(max(1, int(node.num_cpus) // count) for node, count in zip(nodes, per_node))
    num_default = sum(per_node)
    num_workers = config.num_workers or num_default
    crowding = max(1.0, num_workers / num_default)
    total_cpus = sum(node.num_cpus for node in nodes)
    if num_workers > max(1, total_cpus):
        raise RequestError(
            f"compute.num_workers = {num_workers}, but the cluster has {total_cpus:g} CPUs, and a replica on CPUs "
            "needs one of its own"
        )
    threads = config.num_threads_per_worker or max(1, int(threads / crowding))
    cpus_each = _round_down(min(shares) / math.ceil(crowding))
    return num_workers, _survive_loss(cpus_each, nodes, per_replica) if crowding == 1 else cpus_each, threads


def _survive_loss(cpus_each: float, nodes: list[Node], per_replica: int) -> float:
    """A little more for each replica, so that the others' nodes have CPUs for tasks left when one node is lost.

    Its replicas start again wherever they fit. Were they to fill the nodes, no task could start any more, and the run
    would stand still.
    """
    if len(nodes) == 1:
        return cpus_each
    wanted = cpus_each
    while all(_replicas_of(node, per_replica) * wanted < node.num_cpus for node in nodes):
        if not any(_may_fill_up(wanted, node, per_replica) for node in nodes):
            return wanted
        wanted += 0.01
    return cpus_each  # nodes of different sizes: no share suits them all


def _may_fill_up(cpus_each: float, node: Node, per_replica: int) -> bool:
    """Whether as many replicas as fit would take the CPUs that the plan leaves for tasks."""
    left_at_least = node.num_cpus - int(node.num_cpus / cpus_each + 1e-6) * cpus_each
    left_by_plan = node.num_cpus - _replicas_of(node, per_replica) * cpus_each
    return left_at_least < min(1.0, left_by_plan * 3 / 4) + min(1.0, left_by_plan / 4) - 1e-6


def _replicas_of(node: Node, per_replica: int) -> int:
    return max(1, int(node.num_cpus) // per_replica)


def _plan_gpu(config: ComputeConfig, nodes: list[Node]) -> tuple[int, float, int]:
    """Replicas, CPUs each, threads each, on one GPU each."""
    with_gpus = [node for node in nodes if node.num_gpus >= 1]
    num_gpus = int(sum(node.num_gpus for node in nodes))
    num_workers = config.num_workers or num_gpus
    if num_workers > num_gpus or not num_gpus:
        raise RequestError(
            f"compute.use_gpu asks for {max(1, num_workers)} GPUs, one a replica, but the cluster has {num_gpus}"
        )
    # A replica's Python thread feeds the GPU: one CPU, or less where a node has few for each of its GPUs.
    return num_workers, _round_down(min(1.0, *(node.num_cpus / node.num_gpus / 2 for node in with_gpus))), 1


def _replica_share(node: Node) -> float:
    return 0.5 if node.num_cpus < SMALL_NODE_CPUS else 0.75


def _refuse_if_too_many(num_workers: int, cpus_each: float, use_gpu: bool, nodes: list[Node]) -> None:
    total_cpus = sum(node.num_cpus for node in nodes)
    room = sum(
        min(int(node.num_cpus / cpus_each + 1e-6), int(node.num_gpus) if use_gpu else num_workers) for node in nodes
    )
    if num_workers > room or num_workers * cpus_each >= total_cpus:
        raise RequestError(
            f"{num_workers} replicas of {cpus_each:g} CPUs each, and CPUs left for fetching, decoding and writing, do "
            f"not fit the cluster's {total_cpus:g} CPUs on {len(nodes)} nodes: lower compute.num_workers or "
            "compute.num_cpus_per_worker"
        )


def _round_down(num_cpus: float) -> float:
    return max(0.01, math.floor(num_cpus * 100) / 100)  # Ray counts in steps of 1/10,000
