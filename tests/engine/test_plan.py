"""Compute plans for clusters of all shapes."""

import pytest

from pipelines.config.sections import ComputeConfig
from pipelines.engine.plan import plan_compute
from pipelines.errors import RequestError
from pipelines.images.memory import DECODING_SHARE
from pipelines.runtime.nodes import Node

CPU_CLUSTERS = {
    "one core": [Node(1, 0)],
    "laptop": [Node(2, 0)],
    "three": [Node(3, 0)],
    "workstation": [Node(16, 0)],
    "server": [Node(96, 0)],
    "small nodes": [Node(2, 0)] * 5,
    "mixed": [Node(4, 0), Node(64, 0)],
    "head without CPUs": [Node(0, 0), Node(8, 0)],
}


@pytest.mark.parametrize("nodes", CPU_CLUSTERS.values(), ids=CPU_CLUSTERS)
def test_replicas_leave_room_for_a_decode_and_a_write_task(nodes: list[Node]) -> None:
    plan = plan_compute(ComputeConfig(), nodes)
    total = sum(node.num_cpus for node in nodes)
    held = plan.num_workers * plan.num_cpus_per_worker
    assert plan.num_workers >= 1
    assert held + plan.num_cpus_per_decode_task + plan.num_cpus_per_write_task <= total
    assert max(plan.num_cpus_per_worker, plan.num_cpus_per_decode_task) <= max(node.num_cpus for node in nodes)


def test_compiled_code_gets_one_replica_per_cpu() -> None:
    plan = plan_compute(ComputeConfig(), [Node(16, 0)], is_compiled=True)
    assert (plan.num_workers, plan.num_threads_per_worker) == (16, 1)
    assert plan.num_workers * plan.num_cpus_per_worker < 16


def test_replicas_fit_in_memory_and_use_all_cores() -> None:
    memory_bytes = 7e9 / (1 - DECODING_SHARE)
    plan = plan_compute(ComputeConfig(), [Node(16, 0, memory_bytes=memory_bytes)], is_compiled=True)
    assert (plan.num_workers, plan.num_threads_per_worker) == (4, 4)
    plan = plan_compute(ComputeConfig(), [Node(16, 0, memory_bytes=memory_bytes)])
    assert (plan.num_workers, plan.num_threads_per_worker) == (2, 6)  # eight threads each would not fit
    plan = plan_compute(ComputeConfig(batch_size=64), [Node(16, 0, memory_bytes=memory_bytes)])
    assert (plan.num_workers, plan.num_threads_per_worker) == (1, 3)
    assert plan_compute(ComputeConfig(num_workers=8), [Node(16, 0, memory_bytes=7e9)]).num_workers == 8
    assert plan_compute(ComputeConfig(), [Node(2, 0, memory_bytes=5e8)]).num_workers == 1
    assert plan_compute(ComputeConfig(use_gpu=True), [Node(16, 8, memory_bytes=7e9)]).num_workers == 8


def test_two_cores_get_one_replica_with_two_threads() -> None:
    plan = plan_compute(ComputeConfig(), [Node(2, 0)])
    assert (plan.num_workers, plan.num_threads_per_worker, plan.batch_size) == (1, 2, 16)


def test_number_of_replicas_grows_with_the_cores() -> None:
    assert plan_compute(ComputeConfig(), [Node(64, 0)]).num_workers == 16
    assert plan_compute(ComputeConfig(num_workers=2), [Node(2, 0)]).num_threads_per_worker == 1


def test_each_gpu_gets_one_replica() -> None:
    plan = plan_compute(ComputeConfig(use_gpu=True), [Node(16, 8), Node(16, 0)])
    assert (plan.num_workers, plan.num_gpus_per_worker, plan.num_cpus_per_worker) == (8, 1, 1.0)
    assert plan.batch_size == 256


def test_gpu_processes_two_batches_whatever_num_threads_per_worker_is() -> None:
    plan = plan_compute(ComputeConfig(use_gpu=True, num_threads_per_worker=4), [Node(16, 1)])
    assert plan.num_threads_per_worker == 2


def test_given_values_override_the_defaults() -> None:
    config = ComputeConfig(num_workers=3, num_cpus_per_worker=2, num_threads_per_worker=5, batch_size=7)
    plan = plan_compute(config, [Node(16, 0)])
    assert (plan.num_workers, plan.num_cpus_per_worker, plan.num_threads_per_worker) == (3, 2, 5)
    assert plan.batch_size == 8  # 7 is rounded up


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        (ComputeConfig(num_workers=500), [Node(2, 0)], "compute.num_workers = 500, but the cluster has 2 CPUs"),
        (ComputeConfig(use_gpu=True), [Node(2, 0)], "asks for 1 GPUs, one per replica, but the cluster has 0"),
        (ComputeConfig(use_gpu=True, num_workers=9), [Node(64, 8)], "asks for 9 GPUs, .* has 8"),
        (ComputeConfig(num_cpus_per_worker=2), [Node(2, 0)], "do not fit the cluster's 2 CPUs"),
        (ComputeConfig(num_cpus_per_worker=8), [Node(4, 0)] * 4, "do not fit the cluster's 16 CPUs on 4 nodes"),
        (ComputeConfig(), [Node(0, 0)], "no CPUs"),
    ],
)
def test_request_that_does_not_fit_is_refused_with_the_numbers(
    config: ComputeConfig, nodes: list[Node], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        plan_compute(config, nodes)


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 4, 8, 12, 16, 24, 32, 64, 96])
def test_replicas_of_a_lost_node_leave_room_for_tasks_on_the_others(num_cpus: int) -> None:
    plan = plan_compute(ComputeConfig(), [Node(num_cpus, 0)] * 2)
    num_that_fit = int(num_cpus / plan.num_cpus_per_worker + 1e-6)
    left = num_cpus - num_that_fit * plan.num_cpus_per_worker
    assert left >= plan.num_cpus_per_decode_task + plan.num_cpus_per_write_task - 1e-6
    assert plan.num_workers == 2 * plan_compute(ComputeConfig(), [Node(num_cpus, 0)]).num_workers


def test_nodes_of_different_sizes_get_a_plan() -> None:
    plan = plan_compute(ComputeConfig(), [Node(1, 0), Node(8, 0)])
    assert (plan.num_workers, plan.num_cpus_per_worker) == (3, 0.5)


INFERENTIA = ComputeConfig(resources_per_worker={"inferentia": 1})
MIXED = [Node(4, 0, {"inferentia": 2}, "a"), Node(16, 0, {}, "b"), Node(4, 0, {"inferentia": 2}, "c")]


def test_replicas_run_on_nodes_with_the_custom_resource_and_tasks_on_the_others() -> None:
    plan = plan_compute(INFERENTIA, MIXED)
    assert plan.num_workers == 2  # one per 4 CPUs, although the resource would allow two
    assert plan.resources_per_worker == {"inferentia": 1}
    assert plan.avoided_by_tasks == ("a", "c")
    assert (plan.num_cpus_per_decode_task, plan.num_cpus_per_write_task) == (1, 1)


def test_tasks_run_on_accelerator_nodes_if_there_are_no_others() -> None:
    assert plan_compute(INFERENTIA, [MIXED[0]]).avoided_by_tasks == ()
    assert plan_compute(ComputeConfig(use_gpu=True), [Node(16, 8, {}, "a")] * 2).avoided_by_tasks == ()


def test_cpu_nodes_decode_for_gpu_nodes() -> None:
    plan = plan_compute(ComputeConfig(use_gpu=True), [Node(8, 4, {}, "a"), Node(64, 0, {}, "b")])
    assert (plan.num_workers, plan.avoided_by_tasks, plan.num_cpus_per_decode_task) == (4, ("a",), 1)


def test_range_of_replicas_is_limited_to_what_fits_unless_the_cluster_may_grow() -> None:
    config = ComputeConfig(use_gpu=True, num_workers=(2, 8))
    plan = plan_compute(config, [Node(16, 4)])
    assert (plan.min_workers, plan.num_workers) == (2, 4)
    assert plan_compute(config, [Node(16, 4)], may_grow=True).num_workers == 8
    with pytest.raises(RequestError, match="asks for 2 GPUs"):
        plan_compute(config, [Node(16, 1)], may_grow=True)


def test_missing_custom_resource_is_refused_with_the_numbers() -> None:
    with pytest.raises(RequestError, match=r"asks for 1 inferentia .*, but the cluster has 0"):
        plan_compute(INFERENTIA, [Node(8, 0)])
    config = ComputeConfig(resources_per_worker={"inferentia": 1}, num_workers=5)
    with pytest.raises(RequestError, match="asks for 1 inferentia for each of 5 replicas, but the cluster has 4"):
        plan_compute(config, MIXED)


def test_gpu_is_refused_as_a_custom_resource() -> None:
    with pytest.raises(ValueError, match="GPU has a key of its own"):
        ComputeConfig(resources_per_worker={"GPU": 1})


@pytest.mark.parametrize("num_cpus", [1, 2, 4, 16])
@pytest.mark.parametrize("may_grow", [False, True])
def test_range_on_cpus_leaves_room_for_tasks(num_cpus: int, may_grow: bool) -> None:
    plan = plan_compute(ComputeConfig(num_workers=(1, 64)), [Node(num_cpus, 0)], may_grow=may_grow)
    default = plan_compute(ComputeConfig(), [Node(num_cpus, 0)])
    assert plan.num_workers == (64 if may_grow else default.num_workers)
    num_that_fit = min(plan.num_workers, int(num_cpus / plan.num_cpus_per_worker + 1e-6))
    left = num_cpus - num_that_fit * plan.num_cpus_per_worker
    assert left >= plan.num_cpus_per_decode_task + plan.num_cpus_per_write_task - 1e-6


@pytest.mark.parametrize("num_cpus", [2, 3, 4])
def test_small_machines_never_run_three_tasks(num_cpus: int) -> None:
    plan = plan_compute(ComputeConfig(), [Node(num_cpus, 0)])
    left = num_cpus - plan.num_workers * plan.num_cpus_per_worker
    decode, write = plan.num_cpus_per_decode_task, plan.num_cpus_per_write_task
    assert decode + write <= left
    assert min(3 * write, decode + 2 * write, 2 * decode) > left
