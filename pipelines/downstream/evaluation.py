"""The job `evaluate`: top-1 and top-5 of a model over a labelled set, with every image counted once.

labelled images (rows) -> fetch (bytes) -> decode (uint8) -> predict (top-k) -> count
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from pipelines.config.evaluate import EvaluateConfig
from pipelines.engine.engine import Engine
from pipelines.engine.source import TableSource, plan_tasks
from pipelines.errors import RequestError, RunError, root_cause
from pipelines.inputs.labelled import LabelledImages, read_labelled
from pipelines.models.bundle import ModelFacts
from pipelines.models.process import ModelProcess
from pipelines.outputs.columns import TopK
from pipelines.runtime.progress import Progress
from pipelines.runtime.ray_session import ray_session, refuse_if_ray_cannot_start

log = logging.getLogger(__name__)

TOPK = 5
MAX_NAMED_FAILURES = 10


def run(config: EvaluateConfig, model: ModelProcess) -> dict[str, Any]:
    """Evaluate the model that `model` is resolving, and return the summary.

    Images that cannot be read or decoded are counted in `num_failed` and named. They do not enter the accuracies.

    Raises:
        RequestError: The request is wrong, or the images have a class that the model lacks.
        RunError: The run failed, or every image failed.
    """
    started = time.monotonic()
    refuse_if_ray_cannot_start()
    engine = Engine(config, model)
    images = read_labelled(config.input.uri, config.input.exclude, trust_list=config.input.trust_list)
    if not engine.facts.num_classes:
        raise RequestError(
            f"the weights {config.model.weights} have no classifier to evaluate: fine-tune them first with jobs.train"
        )
    if engine.is_quantized:
        positions = engine.sample_positions(images.table.num_rows)
        engine.quantize(images.rows().take(positions), images.reader)
    targets = match_targets(images, engine.facts)
    with ray_session():
        log.info("%s", engine.describe(images.table.num_rows))
        counts = _count(engine, images, targets)
    if not counts.num_images:
        raise RunError(f"all {counts.num_failed} images failed, the first is {counts.failed[0]}")
    wall_time_s = time.monotonic() - started
    return {
        "top1": counts.num_top1 / counts.num_images,
        "top5": counts.num_top5 / counts.num_images,
        "num_images": counts.num_images,
        "num_failed": counts.num_failed,
        "failed": counts.failed[:MAX_NAMED_FAILURES],
        "num_excluded": images.num_excluded,
        "wall_time_s": round(wall_time_s, 3),
        "images_per_s": round(images.table.num_rows / wall_time_s, 3),
    }


def match_targets(images: LabelledImages, model: ModelFacts) -> NDArray[np.int64]:
    """Return the class index of each image: by WordNet id, by label name, or by timm's order if the model has no names.

    Raises:
        RequestError: The images have a class that the model lacks.
    """
    image_classes = images.class_names()
    are_ids = set(image_classes) <= set(model.class_ids)
    if not are_ids and not set(image_classes) <= set(model.label_names):
        from pipelines.models.labels import describe_order, match_by_order  # late: timm

        if (ordered := match_by_order(model.label_names, image_classes)) is not None:
            log.info("%s", describe_order(ordered))
            return images.targets(list(ordered))
    return images.targets(list(model.class_ids if are_ids else model.label_names))


@dataclass
class Counts:
    """Running counts of an evaluation.

    Attributes:
        num_images: Number of images with a prediction.
        num_top1: Number of images whose class was ranked first.
        num_top5: Number of images whose class was among the top five.
        num_failed: Number of images that could not be read or decoded.
        failed: URI and reason of the first few failed images.
    """

    num_images: int = 0
    num_top1: int = 0
    num_top5: int = 0
    num_failed: int = 0
    failed: list[str] = field(default_factory=list)


def _count(engine: Engine, images: LabelledImages, targets: NDArray[np.int64]) -> Counts:
    plan = engine.plan
    options = engine.options((TopK(min(TOPK, engine.facts.num_classes)),))
    inputs = images.rows()
    source = TableSource(inputs, plan_tasks(inputs.num_rows, plan.batch_size, plan.num_threads).starts)
    counter = HitCounter(ray.put(targets))

    def count(predicted: ray.data.Dataset) -> ray.data.Dataset:
        # N:1. Each batch becomes one row with its counts and failures.
        hits: ray.data.Dataset = predicted.map_batches(
            counter, batch_format="pyarrow", batch_size=None, num_cpus=plan.num_cpus_per_write_task
        )
        return hits

    counts = Counts()
    try:
        with Progress(images.table.num_rows) as progress:
            for row in engine.stream(source, images.reader, options, count):
                counts.num_images += row["num_images"]
                counts.num_top1 += row["num_top1"]
                counts.num_top5 += row["num_top5"]
                counts.num_failed += len(row["failed"])
                counts.failed += row["failed"][: MAX_NAMED_FAILURES - len(counts.failed)]
                progress.add(row["num_images"], len(row["failed"]))
    except ray.exceptions.RayError as error:
        raise RunError(root_cause(error)) from error
    return counts


@dataclass(frozen=True)
class HitCounter:
    """Callable that compares predictions with targets.

    Attributes:
        targets: Reference to the class index of each id in the object store.
    """

    targets: "ray.ObjectRef[NDArray[np.int64]]"

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Reduce predictions (`predictions_schema` with top-k) to one row of counts."""
        good = batch.filter(pc.is_valid(batch["index"]))
        failed = batch.filter(pc.is_null(batch["index"]))
        hits = _hits(good, ray.get(self.targets))
        reasons = [f"{row['uri']}: {row['error_kind']}: {row['error_message']}" for row in failed.to_pylist()]
        counts = {"num_images": len(hits), "num_top1": hits[:, 0].sum(), "num_top5": hits.any(axis=1).sum()}
        row = {name: pa.array([int(count)], pa.int64()) for name, count in counts.items()}
        return pa.table(row | {"failed": pa.array([reasons], pa.list_(pa.string()))})


def _hits(good: pa.Table, targets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask of the predictions that are right, images x k."""
    if not good.num_rows:
        return np.zeros((0, 1), np.bool_)
    index = good["index"].combine_chunks().flatten().to_numpy().reshape(good.num_rows, -1)
    return np.asarray(index == targets[good["id"].to_numpy()][:, None])
