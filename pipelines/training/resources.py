"""What each training worker gets of the machines, so that fetching and decoding keep their share."""

from dataclasses import dataclass

from pipelines.config.train import ScalingConfig
from pipelines.errors import RequestError
from pipelines.nodes import Node

# Workers on CPUs share half of the cores; the other half fetches and decodes.
WORKERS_SHARE = 0.5
# Below this share of a core each, they only wait for each other.
MIN_CPUS_PER_WORKER = 0.25


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
    default = {"GPU": 1.0, "CPU": min(1.0, share)} if scaling.use_gpu else {"CPU": share}
    per_worker = scaling.resources_per_worker or default
    wanted = per_worker.get("CPU", 0.0)
    if wanted * least > num_cpus - MIN_CPUS_PER_WORKER and not may_grow:
        raise RequestError(
            f"scaling.num_workers = {least} at {wanted:g} CPUs each asks for {wanted * least:g} of {num_cpus:g} CPUs, "
            f"and leaves none for fetching and decoding"
        )
    left = max(num_cpus - wanted * most, MIN_CPUS_PER_WORKER)
    num_threads = max(1, int(wanted if scaling.resources_per_worker else share / WORKERS_SHARE))
    beside_workers = (1 - WORKERS_SHARE) * max((node.num_cpus for node in nodes), default=1.0)  # a task can't use two
    return WorkerResources(per_worker, None if scaling.use_gpu else num_threads, min(1.0, left / 2, beside_workers))


def _largest_share(nodes: list[Node], num_workers: int) -> float:
    """The most CPUs that each worker can have, where those of one node share `WORKERS_SHARE` of its cores."""
    offers = [node.num_cpus * WORKERS_SHARE for node in nodes]
    shares = {offer / count for offer in offers for count in range(1, num_workers + 1)}
    fitting = (share for share in shares if sum(int(offer / share + 1e-6) for offer in offers) >= num_workers)
    return max(fitting, default=0.0)
