"""Ray Data pipeline: fetch, decode, predict, and the final stages that the job adds."""

from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data

from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.options import PredictOptions
from pipelines.engine.plan import ComputePlan
from pipelines.engine.replica import PredictorActor
from pipelines.engine.source import FetchTask, Source
from pipelines.outputs.writer import PartWriter
from pipelines.runtime.malloc import KEEP_FREED_MEMORY
from pipelines.runtime.ray_compat import range_dataset

# Ray Data plans every task of a dataset before it starts the first one. Larger runs are split into several datasets,
# which run one after the other.
MAX_TASKS_PER_DATASET = 131_072


def stream(
    source: Source,
    decode: FetchAndDecode,
    pickled_bundle: bytes,
    options: PredictOptions,
    plan: ComputePlan,
    finish: Callable[[ray.data.Dataset], ray.data.Dataset],
) -> Iterator[dict[str, Any]]:
    """Run the pipeline over a source.

    Args:
        source: Input rows, one batch per task.
        decode: First stage, which fetches and decodes images.
        pickled_bundle: Pickled `ModelBundle`.
        options: Options of the replicas.
        plan: Resources that each stage declares to Ray.
        finish: Function that adds the final stages. Its input has `predictions_schema`.

    Yields:
        Rows of the last stage.
    """
    source_ref, bundle_ref = ray.put(source), ray.put(pickled_bundle)
    for first in range(0, source.num_tasks, MAX_TASKS_PER_DATASET):
        num_tasks = min(MAX_TASKS_PER_DATASET, source.num_tasks - first)
        images = _fetch_and_decode(FetchTask(source_ref, first, decode), num_tasks, plan)
        yield from finish(_predict(images, bundle_ref, options, plan)).iter_rows()


def _fetch_and_decode(task: FetchTask, num_tasks: int, plan: ComputePlan) -> ray.data.Dataset:
    """Add the fetch and decode stage, 1:N: one task number becomes the images of the task.

    A task is bound by the network and one core. Its output, uint8 images of the model's input size or JPEGs for GPUs,
    goes through the object store.
    """
    num_cpus = plan.num_cpus_per_decode_task
    # Ray fuses the two stages into one task because they request the same resources.
    numbers = range_dataset(num_tasks, num_cpus=num_cpus, **_place_tasks(plan))
    images: ray.data.Dataset = numbers.map_batches(
        task, batch_format="pyarrow", batch_size=1, num_cpus=num_cpus, **_place_tasks(plan)
    )
    # Keep all images of a task in one block. If Ray split blocks by size, most blocks would end in a partial batch.
    images.context.target_max_block_size = None
    return images


def _place_tasks(plan: ComputePlan) -> dict[str, Any]:
    """Return Ray options that keep tasks off the replicas' nodes as long as other nodes have free CPUs."""
    if not plan.avoided_by_tasks:
        return {}
    other_nodes = {"ray.io/node-id": f"!in({','.join(plan.avoided_by_tasks)})"}
    # Ray uses the fallback whenever no preferred node has free resources, not only when no preferred node exists.
    return {"label_selector": other_nodes, "fallback_strategy": [{"label_selector": {}}]}


def _predict(
    images: ray.data.Dataset, bundle_ref: "ray.ObjectRef[bytes]", options: PredictOptions, plan: ComputePlan
) -> ray.data.Dataset:
    """Add the predict stage, 1:1. The object store sends the weights to each node once."""
    predicted: ray.data.Dataset = images.map_batches(
        PredictorActor,
        batch_format="pyarrow",
        # Ray Data requires a batch size when num_gpus is set. It slices the blocks of the tasks without copying them.
        batch_size=plan.batch_size if plan.num_gpus_per_worker else None,
        fn_constructor_args=(bundle_ref, options),
        compute=ray.data.ActorPoolStrategy(
            min_size=plan.min_workers,
            max_size=plan.num_workers,
            initial_size=plan.num_workers,
            max_concurrent_calls_per_actor=plan.num_threads_per_worker,
            enable_true_multi_threading=True,
        ),
        num_cpus=plan.num_cpus_per_worker,
        num_gpus=plan.num_gpus_per_worker or None,
        resources=dict(plan.resources_per_worker) or None,
        runtime_env={"env_vars": {} if plan.num_gpus_per_worker else KEEP_FREED_MEMORY},
    )
    return predicted


def write_stage(writer: PartWriter, num_rows: int, plan: ComputePlan) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
    """Return a function that adds the write stage, N:1: the rows of a file become one write result.

    Args:
        writer: Writer of one batch.
        num_rows: Number of rows per file.
        plan: Resources that the stage declares to Ray.
    """

    def add_write(predicted: ray.data.Dataset) -> ray.data.Dataset:
        write_results: ray.data.Dataset = predicted.map_batches(
            writer,
            batch_format="pyarrow",
            batch_size=num_rows,
            num_cpus=plan.num_cpus_per_write_task,
            **_place_tasks(plan),
        )
        return write_results

    return add_write
