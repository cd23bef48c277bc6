"""Plan CPUs, GPUs and threads from what the cluster has, so that no stage waits for ever for another's CPUs.

Ray schedules by the CPUs that tasks and actors declare. Replicas hold theirs for the whole run: were they to hold all,
no fetch, decode or write task could start, and the run would stand still without a word.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.config.sections import ComputeConfig
from pipelines.errors import RequestError
from pipelines.images.memory import DECODING_SHARE
from pipelines.runtime.nodes import Node


class _Need(NamedTuple):
    """What one replica on CPUs takes.

    Attributes:
        num_cpus: as many threads.
        fixed_bytes: torch and the weights.
        batch_bytes: activations of a batch of `CPU_BATCH_SIZE`.
        is_batch_shared: whether threads have one batch together, not one each.
    """

    num_cpus: int
    fixed_bytes: float
    batch_bytes: float
    is_batch_shared: bool

    def num_bytes(self, batch_size: int) -> float:
        """With all of its threads."""
        batches = 1 if self.is_batch_shared else self.num_cpus
        return self.fixed_bytes + batches * self.batch_bytes * batch_size / CPU_BATCH_SIZE

    def num_threads(self, num_bytes: float, batch_size: int) -> float:
        """That so much memory holds the batches of."""
        if self.is_batch_shared:
            return math.inf
        return (num_bytes - self.fixed_bytes) / (self.batch_bytes * batch_size / CPU_BATCH_SIZE)


# As fast as 32 (within 4 %), and half the memory.
CPU_BATCH_SIZE = 16
# Threads share the weights and the start-up; beyond a few, Python's lock comes between them. The largest that was
# measured, ecaresnet101d, takes 1.7 GB with two threads (0.2 GB of it for Winograd's convolutions).
THREADED = _Need(4, 1.1e9, 0.4e9, is_batch_shared=False)
# Compiled code holds that lock, and threads that share its batch wait for the one that gives way to a decoding task.
# ecaresnet101d takes 1.5 GB in int8.
COMPILED = _Need(1, 1.35e9, 0.4e9, is_batch_shared=True)
SMALL_NODE_CPUS = 4
# In flight: one is computed while the next one goes up and the last one comes down.
BATCHES_PER_GPU = 2
GPU_BATCH_SIZE = 256
# Matrix products round the rows of an incomplete block of rows in another way: an image would depend on its place.
CPU_BATCH_MULTIPLE = 8


@dataclass(frozen=True)
class ComputePlan:
    """What each stage declares to Ray.

    Attributes:
        num_workers: replicas; all are asked for at once.
        min_workers: with so many the run begins.
        num_cpus_per_worker: set aside for each replica.
        num_gpus_per_worker: 1 or 0.
        num_threads_per_worker: batches that a replica has in hand at the same time; on CPUs, each on one core.
        batch_size: images per forward pass.
        num_cpus_per_decode_task: set aside for each fetching and decoding task.
        num_cpus_per_write_task: set aside for each writing task.
        resources_per_worker: custom ones, set aside for each replica.
        avoided_by_tasks: ids of the nodes with accelerators, where others fetch, decode and write while they have room.
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
        """Of all replicas."""
        return self.num_workers * self.num_threads_per_worker


def plan_compute(
    config: ComputeConfig, nodes: list[Node], is_compiled: bool = False, may_grow: bool = False
) -> ComputePlan:
    """Share the nodes among the stages.

    Replicas go where the GPUs, or the custom resources that the config names, are. Everything else goes to the other
    nodes first, where there are any: the CPUs beside a GPU feed it.

    Args:
        config: what the user asked for.
        nodes: the machines of a cluster.
        is_compiled: whether replicas on CPUs run compiled code.
        may_grow: whether more may come, for those of the replicas that do not fit yet.

    Raises:
        RequestError: it cannot be scheduled on these nodes; says what is wanted and what there is.
    """
    working = [node for node in nodes if node.num_cpus > 0]
    if not working:
        raise RequestError("the cluster has no CPUs")
    need = COMPILED if is_compiled else THREADED
    hosts = [(node, slots) for node in working if (slots := _replicas_of(node, config, need))]
    num_default = sum(slots for _, slots in hosts)
    least, most = _wanted(config, num_default)
    _refuse_if_missing(config, least, working)
    others = [node for node in working if not _replicas_of(node, config, need)]
    # On CPUs more replicas than by default only get smaller shares.
    num_present = most if config.use_gpu else max(least, min(most, num_default))
    cpus_each, threads = _plan_gpu(hosts) if config.use_gpu else _plan_cpu(config, hosts, num_present, need, may_grow)
    if config.num_cpus_per_worker is not None:
        cpus_each = config.num_cpus_per_worker
    room = _refuse_if_too_many(least, cpus_each, config, working)
    num_present = min(num_present, room)
    total_cpus = sum(node.num_cpus for node in others or working)
    share_left = 1.0 if others else 1 - num_present * cpus_each / total_cpus
    left = share_left * max(node.num_cpus for node in others or working)  # on one node: a task can't use two
    decode_share, write_share = _task_shares(left)
    return ComputePlan(
        num_workers=most if may_grow else num_present,
        min_workers=least,
        num_cpus_per_worker=cpus_each,
        num_gpus_per_worker=int(config.use_gpu),
        num_threads_per_worker=threads,
        batch_size=_batch_size(config),
        num_cpus_per_decode_task=_round_down(decode_share),
        num_cpus_per_write_task=_round_down(write_share),
        resources_per_worker=config.resources_per_worker,
        avoided_by_tasks=tuple(node.node_id for node, _ in hosts if node.node_id) if others else (),
    )


def _task_shares(left: float) -> tuple[float, float]:
    """CPUs of a decoding and of a writing task, of those that replicas leave."""
    # A whole CPU where there are plenty. On small machines two tasks fit beside the replicas, one of each kind or
    # two that write, and no third one: starting its process would cost more than it ever saves.
    return min(1.0, left * 0.65), min(1.0, left * 0.35)


def _batch_size(config: ComputeConfig) -> int:
    if config.use_gpu:
        return config.batch_size or GPU_BATCH_SIZE
    return math.ceil((config.batch_size or CPU_BATCH_SIZE) / CPU_BATCH_MULTIPLE) * CPU_BATCH_MULTIPLE


def _wanted(config: ComputeConfig, num_default: int) -> tuple[int, int]:
    """The least and the most replicas."""
    if isinstance(config.num_workers, tuple):
        return config.num_workers
    wanted = config.num_workers or max(1, num_default)
    return wanted, wanted


def _replicas_of(node: Node, config: ComputeConfig, need: _Need) -> int:
    """How many a node gets by default; 0 where it lacks what they need."""
    most = _most_replicas_of(node, config)
    if config.use_gpu:
        return most
    num_held = _replica_bytes(node) / need.num_bytes(_batch_size(config))
    return min(most, max(1, int(min(node.num_cpus // need.num_cpus, num_held))))


def _plan_cpu(
    config: ComputeConfig, hosts: list[tuple[Node, int]], num_workers: int, need: _Need, may_grow: bool
) -> tuple[float, int]:
    """CPUs and threads of each replica, without GPUs."""
    nodes = [node for node, _ in hosts]
    shares = [_replica_share(node) * node.num_cpus / slots for node, slots in hosts]
    threads = min(_threads_of(node, slots, need, _batch_size(config)) for node, slots in hosts)
    crowding = max(1.0, num_workers / sum(slots for _, slots in hosts))
    total_cpus = sum(node.num_cpus for node in nodes)
    if num_workers > max(1, total_cpus):
        raise RequestError(
            f"compute.num_workers = {num_workers}, but the cluster has {total_cpus:g} CPUs, and a replica on CPUs "
            "needs one of its own"
        )
    threads = config.num_threads_per_worker or max(1, int(threads / crowding))
    cpus_each = _round_down(min(shares) / math.ceil(crowding))
    # One node's replicas may come to run on another one.
    may_move = (len(nodes) > 1 or may_grow) and crowding == 1 and not config.resources_per_worker
    return _survive_loss(cpus_each, nodes, config, need) if may_move else cpus_each, threads


def _threads_of(node: Node, num_replicas: int, need: _Need, batch_size: int) -> int:
    """Of each of a node's replicas: one a core, where its memory holds the batches of all."""
    num_held = need.num_threads(_replica_bytes(node) / num_replicas, batch_size)
    return max(1, int(min(node.num_cpus // num_replicas, num_held)))


def _replica_bytes(node: Node) -> float:
    """Return the memory of a node that replicas may take; the rest is for decoding."""
    return node.memory_bytes * (1 - DECODING_SHARE)


def _survive_loss(cpus_each: float, nodes: list[Node], config: ComputeConfig, need: _Need) -> float:
    """A little more for each replica, so that nodes have CPUs for tasks left when replicas of another node come.

    Those of a lost node start again wherever they fit, and so do those that wait for a new node. Were they to fill the
    nodes, no task could start any more, and the run would stand still.
    """
    counts = [_replicas_of(node, config, need) for node in nodes]
    wanted = cpus_each
    while all(count * wanted < node.num_cpus for node, count in zip(nodes, counts)):
        if not any(_may_fill_up(wanted, node, count) for node, count in zip(nodes, counts)):
            return wanted
        wanted += 0.01
    return cpus_each  # nodes of different sizes: no share suits them all


def _may_fill_up(cpus_each: float, node: Node, num_planned: int) -> bool:
    """Whether as many replicas as fit would take the CPUs that the plan leaves for tasks."""
    left_at_least = node.num_cpus - _times(node.num_cpus, cpus_each) * cpus_each
    left_by_plan = node.num_cpus - num_planned * cpus_each
    return left_at_least < sum(_task_shares(left_by_plan)) - 1e-6


def _plan_gpu(hosts: list[tuple[Node, int]]) -> tuple[float, int]:
    """CPUs and threads of each replica, on one GPU each."""
    # A replica's Python thread feeds the GPU: one CPU, or less where a node has few for each of its GPUs.
    return _round_down(min(1.0, *(node.num_cpus / node.num_gpus / 2 for node, _ in hosts))), BATCHES_PER_GPU


def _replica_share(node: Node) -> float:
    return 0.5 if node.num_cpus < SMALL_NODE_CPUS else 0.75


def _refuse_if_missing(config: ComputeConfig, num_workers: int, nodes: list[Node]) -> None:
    if config.use_gpu and num_workers > (num_gpus := sum(int(node.num_gpus) for node in nodes)):
        raise RequestError(
            f"compute.use_gpu asks for {num_workers} GPUs, one a replica, but the cluster has {num_gpus}"
        )
    for name, amount in config.resources_per_worker.items():
        offers = [node.resources.get(name, 0) for node in nodes]
        if num_workers > sum(_times(offer, amount) for offer in offers):
            raise RequestError(
                f"compute.resources_per_worker asks for {amount:g} {name} for each of {num_workers} replicas, but "
                f"the cluster has {sum(offers):g}"
            )


def _times(offer: float, amount: float) -> int:
    """How often an amount fits what a node offers."""
    return int(offer / amount + 1e-6)


def _refuse_if_too_many(num_workers: int, cpus_each: float, config: ComputeConfig, nodes: list[Node]) -> int:
    """How many replicas have room."""
    total_cpus = sum(node.num_cpus for node in nodes)
    room = sum(min(_times(node.num_cpus, cpus_each), _most_replicas_of(node, config)) for node in nodes)
    if num_workers > room or num_workers * cpus_each >= total_cpus:
        raise RequestError(
            f"{num_workers} replicas of {cpus_each:g} CPUs each, and CPUs left for fetching, decoding and writing, do "
            f"not fit the cluster's {total_cpus:g} CPUs on {len(nodes)} nodes: lower compute.num_workers or "
            "compute.num_cpus_per_worker"
        )
    return room


def _most_replicas_of(node: Node, config: ComputeConfig) -> int:
    """As many as GPUs and custom resources allow; of its CPUs each takes one, for a thread."""
    slots = int(node.num_gpus) if config.use_gpu else max(1, int(node.num_cpus))
    custom = config.resources_per_worker.items()
    return min([slots, *(_times(node.resources.get(name, 0), amount) for name, amount in custom)])


def _round_down(num_cpus: float) -> float:
    return max(0.01, math.floor(num_cpus * 100) / 100)  # Ray counts in steps of 1/10,000
