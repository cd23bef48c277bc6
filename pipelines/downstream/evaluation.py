"""Top-1 and top-5 of a model over a labelled set, by the chain that labels images: every image is counted once.

labelled (what) -> fetch (bytes) -> decode (uint8) -> predict (top-k) -> count
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
from pipelines.engine.autoscaling import plan_for_cluster
from pipelines.engine.chain import describe, stream
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.plan import ComputePlan, plan_compute
from pipelines.engine.quantization_sample import every_nth, read_sample, refuse_if_unable
from pipelines.engine.replica import PredictOptions
from pipelines.engine.source import TableSource, cut_into_tasks, rows_per_task
from pipelines.errors import RequestError, RunError, root_cause
from pipelines.inputs.labelled import LabelledImages, read_labelled
from pipelines.models.bundle import ModelFacts
from pipelines.models.process import ModelProcess
from pipelines.runtime.nodes import this_machine
from pipelines.runtime.progress import Progress
from pipelines.runtime.ray_session import is_cluster_named, ray_session, refuse_if_ray_cannot_start

log = logging.getLogger(__name__)

TOPK = 5
MAX_NAMED_FAILURES = 10


def run(config: EvaluateConfig, model: ModelProcess) -> dict[str, Any]:
    """Measure the model that `model` is resolving; returns the summary.

    Images that cannot be had are counted in `num_failed` and named; the shares are of those that could.

    Raises:
        RequestError: the request is wrong, or the images have a class that the model lacks.
        RunError: the run failed, or not one image could be had.
    """
    started = time.monotonic()
    refuse_if_ray_cannot_start()
    is_compiled = config.model.dtype == "int8"
    plan = None if is_cluster_named() else plan_compute(config.compute, [this_machine()], is_compiled)
    if is_compiled:
        refuse_if_unable(config.compute.use_gpu, is_cluster_named())
    images = read_labelled(config.input.uri, config.input.exclude, trust_list=config.input.trust_list)
    facts = model.facts()
    if not facts.num_classes:
        raise RequestError(f"the weights {config.model.weights} have no classifier to evaluate; fine-tune them first")
    if facts.dtype == "int8":
        positions = every_nth(images.table.num_rows, config.model.quantization.num_images)
        rows = pa.table({"id": positions, "uri": images.table["uri"].take(positions).combine_chunks()})
        facts = model.quantized_facts(read_sample(rows, _make_decode(config, facts)).images)
    targets = targets_of(images, facts)
    with ray_session():
        plan = plan or plan_for_cluster(config.compute, is_compiled)
        log.info("%s", describe(images.table.num_rows, facts, plan))
        counts = _count(config, facts, model.pickled_bundle(), plan, images, targets)
    if not counts.num_images:
        raise RunError(f"not one of {counts.num_failed} images could be had: {counts.failed[0]}")
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


def targets_of(images: LabelledImages, model: ModelFacts) -> NDArray[np.int64]:
    """Find the class of each image: by name, by WordNet id, or by timm's order where the model names no classes.

    Raises:
        RequestError: the images have a class that the model lacks.
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
    """What came out so far.

    Attributes:
        num_images: measured.
        num_top1: whose class came first.
        num_top5: whose class was among the first five.
        num_failed: that could not be had.
        failed: URI and reason of some of these.
    """

    num_images: int = 0
    num_top1: int = 0
    num_top5: int = 0
    num_failed: int = 0
    failed: list[str] = field(default_factory=list)


def _make_decode(config: EvaluateConfig, model: ModelFacts) -> FetchAndDecode:
    preprocess = config.preprocess
    return FetchAndDecode(model.transform, config.input.max_bytes, preprocess.max_pixels, preprocess.mode)


def _count(
    config: EvaluateConfig,
    model: ModelFacts,
    pickled_bundle: bytes,
    plan: ComputePlan,
    images: LabelledImages,
    targets: NDArray[np.int64],
) -> Counts:
    decode = _make_decode(config, model)
    use_gpu, num_threads = plan.num_gpus_per_worker > 0, plan.num_threads_per_worker
    topk = min(TOPK, model.num_classes)
    limit = config.preprocess.max_pixels_on_device
    options = PredictOptions(plan.batch_size, topk, False, use_gpu, num_threads, config.model.compile, limit)
    inputs = pa.table({"id": np.arange(images.table.num_rows), "uri": images.table["uri"].combine_chunks()})
    num_rows = rows_per_task(inputs.num_rows, plan.batch_size, plan.num_threads)
    source = TableSource(inputs, cut_into_tasks(inputs.num_rows, num_rows, plan.batch_size, plan.num_threads))
    counter = HitCounter(ray.put(targets))

    def count(predicted: ray.data.Dataset) -> ray.data.Dataset:
        # N:1. A batch's hits come back, and what failed in it.
        hits: ray.data.Dataset = predicted.map_batches(
            counter, batch_format="pyarrow", batch_size=None, num_cpus=plan.num_cpus_per_write_task
        )
        return hits

    counts = Counts()
    try:
        with Progress(images.table.num_rows) as progress:
            for row in stream(source, decode, pickled_bundle, options, plan, count):
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
    """Compares predictions with targets.

    Attributes:
        targets: the class of each id, in the object store.
    """

    targets: "ray.ObjectRef[NDArray[np.int64]]"

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`predictions_schema` with top-k to one row of counts."""
        good = batch.filter(pc.is_valid(batch["index"]))
        failed = batch.filter(pc.is_null(batch["index"]))
        hits = _hits(good, ray.get(self.targets))
        reasons = [f"{row['uri']}: {row['error_kind']}: {row['error_message']}" for row in failed.to_pylist()]
        counts = {"num_images": len(hits), "num_top1": hits[:, 0].sum(), "num_top5": hits.any(axis=1).sum()}
        row = {name: pa.array([int(count)], pa.int64()) for name, count in counts.items()}
        return pa.table(row | {"failed": pa.array([reasons], pa.list_(pa.string()))})


def _hits(good: pa.Table, targets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each prediction is the image's class: images x k."""
    if not good.num_rows:
        return np.zeros((0, 1), np.bool_)
    index = good["index"].combine_chunks().flatten().to_numpy().reshape(good.num_rows, -1)
    return np.asarray(index == targets[good["id"].to_numpy()][:, None])
