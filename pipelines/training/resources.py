"""What each training worker gets of the machines, so that fetching and decoding keep their share."""

import math
from dataclasses import dataclass

from pipelines.config.train import ScalingConfig
from pipelines.errors import RequestError
from pipelines.runtime.nodes import Node

# Workers on CPUs share half of the cores; the other half fetches and decodes.
WORKERS_SHARE = 0.5
# Below this share of a core each, they only wait for each other.
MIN_CPUS_PER_WORKER = 0.25
# Shares of a core that are smaller would let too many tasks in at the same time.
MIN_CPUS_PER_TASK = 0.125


@dataclass(frozen=True)
class WorkerResources:
    """A plan.

    Attributes:
        per_worker: what Ray sets aside for each worker.
        num_threads: of torch in each worker; None leaves it to torch.
        num_cpus_per_task: what Ray sets aside for each share in the making.
    """

    per_worker: dict[str, float]
    num_threads: int | None
    num_cpus_per_task: float


def plan_workers(scaling: ScalingConfig, nodes: list[Node], may_grow: bool) -> WorkerResources:
    """Share the nodes among the workers and the tasks beside them.

    Args:
        scaling: what the user asked for.
        nodes: the machines of the cluster.
        may_grow: whether an autoscaler may bring more.

    Raises:
        RequestError: the cluster can't grow, and the least number of workers does not fit on it.
    """
    num_cpus, num_gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    workers = scaling.num_workers
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if scaling.use_gpu and num_gpus < least and not may_grow:
        raise RequestError(f"scaling.num_workers = {least} asks for {least} GPUs; the cluster has {num_gpus:g}")
    share = max(_largest_share(nodes, most), MIN_CPUS_PER_WORKER)
    default = {"GPU": 1.0, "CPU": min(1.0, share)} if scaling.use_gpu else {"CPU": _survive_loss(share, nodes, most)}
    cpus = {} if scaling.num_cpus_per_worker is None else {"CPU": scaling.num_cpus_per_worker}
    per_worker = default | cpus | scaling.resources_per_worker
    wanted = per_worker["CPU"]
    if wanted * least > num_cpus - MIN_CPUS_PER_WORKER and not may_grow:
        raise RequestError(
            f"scaling.num_workers = {least} at {wanted:g} CPUs each asks for {wanted * least:g} of {num_cpus:g} CPUs, "
            f"and leaves none for fetching and decoding"
        )
    left = max(num_cpus - wanted * most, MIN_CPUS_PER_WORKER)
    num_threads = max(1, int(wanted if scaling.num_cpus_per_worker else share / WORKERS_SHARE))
    # A task can't use two nodes; and it has to fit beside as many workers as a node may come to hold.
    beside_workers = (1 - WORKERS_SHARE) * max((node.num_cpus for node in nodes), default=1.0)
    num_cpus_per_task = min(1.0, left / 2, beside_workers)
    if (room := _room(wanted, nodes, most)) >= MIN_CPUS_PER_TASK:
        num_cpus_per_task = min(num_cpus_per_task, room)
    return WorkerResources(per_worker, None if scaling.use_gpu else num_threads, _round_down(num_cpus_per_task))


def _survive_loss(share: float, nodes: list[Node], num_workers: int) -> float:
    """A little more for each worker, where those of a lost node would otherwise fill another node.

    Ray Train starts a group again wherever it fits. Were it to fill the nodes that are left, no share of an epoch could
    be made any more, and the training would stand still; so it waits until Ray has enough nodes for both.
    """
    wanted = share
    while len(nodes) > 1 and sum(_num_fitting(wanted, node, num_workers) for node in nodes) >= num_workers:
        if _room(wanted, nodes, num_workers) >= MIN_CPUS_PER_WORKER:
            return round(wanted, 2)
        wanted += 0.01
    return share


def _room(wanted: float, nodes: list[Node], num_workers: int) -> float:
    """CPUs that are left on the node where least are, when each holds as many workers as it can."""
    return min((node.num_cpus - _num_fitting(wanted, node, num_workers) * wanted for node in nodes), default=0.0)


def _num_fitting(wanted: float, node: Node, num_workers: int) -> int:
    return min(num_workers, int(node.num_cpus / wanted + 1e-6)) if wanted else 0


def _round_down(num_cpus: float) -> float:
    return math.floor(num_cpus * 1000) / 1000


def _largest_share(nodes: list[Node], num_workers: int) -> float:
    """The most CPUs that each worker can have, where those of one node share `WORKERS_SHARE` of its cores."""
    offers = [node.num_cpus * WORKERS_SHARE for node in nodes]
    shares = {offer / count for offer in offers for count in range(1, num_workers + 1)}
    fitting = (share for share in shares if sum(int(offer / share + 1e-6) for offer in offers) >= num_workers)
    return max(fitting, default=0.0)
