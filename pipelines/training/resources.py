"""CPUs and GPUs of the training workers, planned so that enough CPUs remain for fetching and decoding."""

import math
from dataclasses import dataclass

from pipelines.config.train import ScalingConfig
from pipelines.errors import RequestError
from pipelines.runtime.nodes import Node

# Fraction of the cores for workers on CPUs. The rest fetches and decodes.
WORKERS_CPU_FRACTION = 0.5
# With less, workers spend their time waiting for each other.
MIN_CPUS_PER_WORKER = 0.25
# With less, Ray would run too many tasks at the same time.
MIN_CPUS_PER_TASK = 0.125


@dataclass(frozen=True)
class WorkerResources:
    """Resources of workers and of the tasks that load local batches.

    Attributes:
        per_worker: Resources that Ray reserves for each worker, by name.
        num_threads: Number of torch threads in each worker; None keeps torch's default.
        num_cpus_per_task: CPUs that Ray reserves for each task that loads local batches.
    """

    per_worker: dict[str, float]
    num_threads: int | None
    num_cpus_per_task: float


def plan_workers(scaling: ScalingConfig, nodes: list[Node], may_grow: bool) -> WorkerResources:
    """Divide the nodes between the workers and the tasks that load local batches.

    Args:
        scaling: Resources that the user asked for.
        nodes: Nodes of the cluster.
        may_grow: True if an autoscaler may add nodes.

    Raises:
        RequestError: The smallest number of workers does not fit on the cluster, which cannot grow.
    """
    num_cpus, num_gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    workers = scaling.num_workers
    min_workers, max_workers = (workers, workers) if isinstance(workers, int) else workers
    if scaling.use_gpu and num_gpus < min_workers and not may_grow:
        raise RequestError(
            f"scaling.num_workers = {min_workers} needs {min_workers} GPUs; the cluster has {num_gpus:g}"
        )
    fitting = max(_max_cpus_per_worker(nodes, max_workers), MIN_CPUS_PER_WORKER)
    if scaling.use_gpu:
        default = {"GPU": 1.0, "CPU": min(1.0, fitting)}
    else:
        default = {"CPU": _leave_room_for_tasks(fitting, nodes, max_workers)}
    asked = {} if scaling.num_cpus_per_worker is None else {"CPU": scaling.num_cpus_per_worker}
    per_worker = default | asked | scaling.resources_per_worker
    cpus_per_worker = per_worker["CPU"]
    if cpus_per_worker * min_workers > num_cpus - MIN_CPUS_PER_WORKER and not may_grow:
        raise RequestError(
            f"scaling.num_workers = {min_workers} at {cpus_per_worker:g} CPUs each needs "
            f"{cpus_per_worker * min_workers:g} of {num_cpus:g} CPUs, and leaves none for fetching and decoding"
        )
    left = max(num_cpus - cpus_per_worker * max_workers, MIN_CPUS_PER_WORKER)
    num_threads = max(1, int(scaling.num_cpus_per_worker or fitting / WORKERS_CPU_FRACTION))
    # A task cannot span two nodes, and it has to fit beside as many workers as a node may come to hold.
    beside_workers = (1 - WORKERS_CPU_FRACTION) * max((node.num_cpus for node in nodes), default=1.0)
    num_cpus_per_task = min(1.0, left / 2, beside_workers)
    if (free := _min_free_cpus(cpus_per_worker, nodes, max_workers)) >= MIN_CPUS_PER_TASK:
        num_cpus_per_task = min(num_cpus_per_task, free)
    return WorkerResources(per_worker, None if scaling.use_gpu else num_threads, _round_down(num_cpus_per_task))


def _leave_room_for_tasks(fitting: float, nodes: list[Node], num_workers: int) -> float:
    """Raise the CPUs per worker until the workers of a lost node cannot fill the other nodes completely.

    Ray Train restarts a group of workers wherever it fits. If it filled the remaining nodes, no task could load a local
    batch and the training would hang. With more CPUs per worker, the restart waits until there are enough nodes.

    Args:
        fitting: Largest number of CPUs per worker that fits.
        nodes: Nodes of the cluster.
        num_workers: Number of workers.

    Returns:
        CPUs per worker; `fitting` if no larger number leaves room.
    """
    cpus_per_worker = fitting
    while len(nodes) > 1 and sum(_num_fitting(cpus_per_worker, node, num_workers) for node in nodes) >= num_workers:
        if _min_free_cpus(cpus_per_worker, nodes, num_workers) >= MIN_CPUS_PER_WORKER:
            return round(cpus_per_worker, 2)
        cpus_per_worker += 0.01
    return fitting


def _min_free_cpus(cpus_per_worker: float, nodes: list[Node], num_workers: int) -> float:
    """Return the smallest number of CPUs left on a node if each node holds as many workers as it can."""
    left = (node.num_cpus - _num_fitting(cpus_per_worker, node, num_workers) * cpus_per_worker for node in nodes)
    return min(left, default=0.0)


def _num_fitting(cpus_per_worker: float, node: Node, num_workers: int) -> int:
    return min(num_workers, int(node.num_cpus / cpus_per_worker + 1e-6)) if cpus_per_worker else 0


def _round_down(num_cpus: float) -> float:
    return math.floor(num_cpus * 1000) / 1000


def _max_cpus_per_worker(nodes: list[Node], num_workers: int) -> float:
    """Return the most CPUs that every worker can have within `WORKERS_CPU_FRACTION` of each node's cores."""
    offers = [node.num_cpus * WORKERS_CPU_FRACTION for node in nodes]
    candidates = {offer / count for offer in offers for count in range(1, num_workers + 1)}
    fitting = (cpus for cpus in candidates if sum(int(offer / cpus + 1e-6) for offer in offers) >= num_workers)
    return max(fitting, default=0.0)
