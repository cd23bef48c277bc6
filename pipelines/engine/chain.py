"""The chain of stages that Ray Data runs: fetch, decode, predict, and what the job adds at the end."""

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

# Ray Data plans every task of a dataset before the first one runs. More images than these tasks hold take several
# datasets, one after the other.
MAX_TASKS_PER_DATASET = 131_072


def stream(
    source: Source,
    decode: FetchAndDecode,
    pickled_bundle: bytes,
    options: PredictOptions,
    plan: ComputePlan,
    finish: Callable[[ray.data.Dataset], ray.data.Dataset],
) -> Iterator[dict[str, Any]]:
    """Run the chain over all of a source.

    Args:
        source: what goes in.
        decode: fetches and decodes.
        pickled_bundle: the model.
        options: how replicas run.
        plan: what each stage declares to Ray.
        finish: adds the last stages, from `predictions_schema` to what is returned.

    Yields:
        The rows of the last stage.
    """
    held_source, held_bundle = ray.put(source), ray.put(pickled_bundle)
    for first in range(0, source.num_tasks, MAX_TASKS_PER_DATASET):
        num_tasks = min(MAX_TASKS_PER_DATASET, source.num_tasks - first)
        images = _fetch_and_decode(FetchTask(held_source, first, decode), num_tasks, plan)
        yield from finish(_predict(images, held_bundle, options, plan)).iter_rows()


def _fetch_and_decode(task: FetchTask, num_tasks: int, plan: ComputePlan) -> ray.data.Dataset:
    """Network and one core; through the object store go uint8 images of the input size, or JPEGs for GPUs."""
    num_cpus = plan.num_cpus_per_decode_task
    # Ray fuses the two stages into one task because they request the same resources.
    numbers = range_dataset(num_tasks, num_cpus=num_cpus, **_place_tasks(plan))
    images: ray.data.Dataset = numbers.map_batches(
        task, batch_format="pyarrow", batch_size=1, num_cpus=num_cpus, **_place_tasks(plan)
    )
    # A task's images are one block, however large: cut by bytes, most blocks would end in a batch that is not full.
    images.context.target_max_block_size = None
    return images


def _place_tasks(plan: ComputePlan) -> dict[str, Any]:
    """Where fetching, decoding and writing run: beside replicas only what the other nodes have no room for."""
    if not plan.avoided_by_tasks:
        return {}
    elsewhere = {"ray.io/node-id": f"!in({','.join(plan.avoided_by_tasks)})"}
    # Ray takes the fallback when no node of the first choice is free, not only when there is none.
    return {"label_selector": elsewhere, "fallback_strategy": [{"label_selector": {}}]}


def _predict(
    images: ray.data.Dataset, bundle: "ray.ObjectRef[bytes]", options: PredictOptions, plan: ComputePlan
) -> ray.data.Dataset:
    """Rows 1:1. Replicas hold the model; the weights travel once to each node, through the object store."""
    predicted: ray.data.Dataset = images.map_batches(
        PredictorActor,
        batch_format="pyarrow",
        # With num_gpus, Ray Data insists on a batch size. It slices the tasks' blocks without copying them.
        batch_size=plan.batch_size if plan.num_gpus_per_worker else None,
        fn_constructor_args=(bundle, options),
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


def writing(writer: PartWriter, num_rows: int, plan: ComputePlan) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
    """The last stage of a run that writes: N:1, as many rows as a file takes; a write_result for each file comes back.

    Args:
        writer: writes one batch.
        num_rows: of a file.
        plan: what the stage declares to Ray.
    """

    def write(predicted: ray.data.Dataset) -> ray.data.Dataset:
        write_results: ray.data.Dataset = predicted.map_batches(
            writer,
            batch_format="pyarrow",
            batch_size=num_rows,
            num_cpus=plan.num_cpus_per_write_task,
            **_place_tasks(plan),
        )
        return write_results

    return write
