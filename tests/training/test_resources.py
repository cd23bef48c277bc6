"""CPUs, GPUs and threads of the training workers."""

from typing import Any

import pytest

from pipelines.config.train import ScalingConfig
from pipelines.errors import RequestError
from pipelines.runtime.nodes import Node
from pipelines.training.resources import plan_workers

CLUSTERS = {
    "one core": [Node(1, 0)],
    "laptop": [Node(2, 0)],
    "server": [Node(96, 0)],
    "as many GPUs as CPUs": [Node(4, 4)],
    "GPU nodes": [Node(16, 1)] * 4,
}


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("num_workers", [1, 2, (1, 3)])
def test_plan_leaves_cpus_for_fetching_and_decoding(name: str, num_workers: Any) -> None:
    nodes = CLUSTERS[name]
    use_gpu = nodes[0].num_gpus > 0
    plan = plan_workers(ScalingConfig(num_workers=num_workers, use_gpu=use_gpu), nodes, may_grow=False)
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    left = sum(node.num_cpus for node in nodes) - most * plan.per_worker["CPU"]
    assert 0 < plan.num_cpus_per_task <= max(left, 0.125)
    assert plan.per_worker.get("GPU", 0) == use_gpu
    assert (plan.num_threads is None) == use_gpu


@pytest.mark.parametrize("num_cpus", [0.5, 0.99, 0.999, 1.0])
def test_tasks_get_a_minimum_of_cpus_for_any_num_cpus_per_worker(num_cpus: float) -> None:
    scaling = ScalingConfig(num_workers=2, num_cpus_per_worker=num_cpus)
    assert plan_workers(scaling, [Node(2, 0)] * 2, may_grow=False).num_cpus_per_task >= 0.125


def test_threads_divide_the_cores_or_follow_resources_per_worker() -> None:
    laptop = CLUSTERS["laptop"]
    assert plan_workers(ScalingConfig(num_workers=1), laptop, False).num_threads == 2
    assert plan_workers(ScalingConfig(num_workers=2), laptop, False).num_threads == 1
    assert plan_workers(ScalingConfig(num_cpus_per_worker=1), laptop, False).num_threads == 1


@pytest.mark.parametrize(
    ("num_cpus", "num_workers", "cpus_per_worker", "num_threads"),
    [
        ([2, 2, 2], 2, 1, 2),  # one worker per node
        ([4] * 8, 2, 2, 4),  # a worker cannot span nodes
        ([2, 64, 64], 4, 16, 32),  # the small node is left to the tasks
        ([8, 8], 3, 2, 4),
    ],
)
def test_workers_are_spread_over_nodes_and_each_fits_on_one(
    num_cpus: list[float], num_workers: int, cpus_per_worker: float, num_threads: int
) -> None:
    plan = plan_workers(ScalingConfig(num_workers=num_workers), [Node(count, 0) for count in num_cpus], False)
    # 0.01 CPUs are added if the workers of a lost node would otherwise fill another node.
    assert cpus_per_worker <= plan.per_worker["CPU"] <= cpus_per_worker + 0.01
    assert plan.num_threads == num_threads


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_nodes", [2, 3, 5])
@pytest.mark.parametrize("num_workers", [2, 3])
def test_tasks_fit_beside_the_workers_of_a_lost_node(num_cpus: float, num_nodes: int, num_workers: int) -> None:
    plan = plan_workers(ScalingConfig(num_workers=num_workers), [Node(num_cpus, 0)] * num_nodes, False)
    cpus_per_worker = plan.per_worker["CPU"]
    max_per_node = min(num_workers, int(num_cpus / cpus_per_worker))
    assert max_per_node * num_nodes >= num_workers
    assert max_per_node * cpus_per_worker + plan.num_cpus_per_task <= num_cpus


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"num_workers": 9}, "scaling.num_workers = 9 at 0.25 CPUs each needs 2.25 of 2 CPUs"),
        ({"use_gpu": True}, "needs 1 GPUs; the cluster has 0"),
        ({"num_cpus_per_worker": 2}, "leaves none for fetching and decoding"),
    ],
)
def test_workers_that_do_not_fit_are_rejected_unless_nodes_may_be_added(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_workers(ScalingConfig(**scaling), CLUSTERS["laptop"], may_grow=False)
    assert plan_workers(ScalingConfig(**scaling), CLUSTERS["laptop"], may_grow=True)


@pytest.mark.parametrize("num_workers", [0, (0, 2), (3, 2)])
def test_invalid_numbers_of_workers_are_rejected(num_workers: Any) -> None:
    with pytest.raises(ValueError, match="the minimum and maximum"):
        ScalingConfig(num_workers=num_workers)
