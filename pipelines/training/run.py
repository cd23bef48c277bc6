"""Train and fine-tune: from a config to the best checkpoint, by Ray Train.

labelled (what) -> start (weights, classes) -> trainer (workers, restarts) -> loop (each worker) -> summary
"""

import logging
import posixpath
import time
from typing import Any

import pyarrow as pa
import ray
import ray.train
from ray.train import LoggingConfig
from ray.train.torch import TorchTrainer

from pipelines import run_record
from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError, RunError
from pipelines.ray_session import ray_session
from pipelines.storage import uris
from pipelines.storage.labelled import LabelledImages, find_pinned, pin, read_labelled
from pipelines.training.job import ImageSet, TrainJob
from pipelines.training.loop import SCORE, final_score, mean_rate, train_worker
from pipelines.training.order import EpochOrder
from pipelines.training.resources import WorkerResources, plan_workers
from pipelines.training.start import StartingPoint, resolve_start

log = logging.getLogger(__name__)

# What may differ between two runs that share an output.
FREE_SECTIONS = ("scaling", "logging", "checkpoint", "failure")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train to the last epoch; returns the summary. Goes on from the output's last checkpoint where it has one.

    Raises:
        RequestError: the request is wrong, before anything was computed.
        RunError: the run failed; its checkpoints stay, and the same command goes on from there.
    """
    started = time.monotonic()
    config = _normalized(config)
    output_uri = config.output.uri
    identity = _identity(config)
    found = run_record.find_run(output_uri)
    if found is not None:
        run_record.refuse_other_run(output_uri, found, identity)
        if "summary" in found:
            log.info("nothing to do: %s holds a finished run", output_uri)
            return dict(found["summary"])
    sections = {"train": config.data.train, "validation": config.data.validation}
    wanted = {name: section for name, section in sections.items() if section is not None}
    pinned = {name: find_pinned(output_uri, name) for name in wanted}
    sets = {name: pinned[name] or read_labelled(section.uri, section.exclude) for name, section in wanted.items()}
    # Refuses a set too small for one batch, before the weights are read.
    EpochOrder(sets["train"].table.num_rows, config.optim.global_batch_size, config.optim.seed)
    start = resolve_start(config, sets["train"].class_names())
    class_names = list(start.class_names)
    tables = {name: _table(images, class_names) for name, images in sets.items()}
    record = {"config": config.model_dump(mode="json"), "identity": identity, "label_names": class_names}
    run_record.write_run(output_uri, record)
    for name, images in sets.items():
        if pinned[name] is None:
            pin(output_uri, name, images)
    with ray_session():
        result = _fit(config, start, tables, plan_workers(config.scaling))
    summary = _summary(config, result, started)
    run_record.write_run(output_uri, record | {"history": result.return_value["history"], "summary": summary})
    run_record.mark_complete(output_uri)
    return summary


def _fit(config: TrainConfig, start: StartingPoint, tables: dict[str, pa.Table], resources: WorkerResources) -> Any:
    sets = {name: ImageSet(ray.put(table), table.num_rows) for name, table in tables.items()}
    job = TrainJob(
        config=config,
        start=ray.put(start),
        train=sets["train"],
        validation=sets.get("validation"),
        num_threads=resources.num_threads,
        num_cpus_per_task=resources.num_cpus_per_task,
    )
    num_workers: Any = config.scaling.num_workers  # a range too, which the annotations of Ray leave out
    parent, name = posixpath.split(config.output.uri)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker=resources.per_worker,
            placement_strategy=config.scaling.placement_strategy,
            accelerator_type=config.scaling.accelerator_type,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            failure_config=ray.train.FailureConfig(max_failures=config.failure.max_failures),
            # The best by score, and always the last.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg] # our own lines say enough
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise RunError(f"{reason}; checkpoints stay, and the same command goes on from the last") from error


def _train_worker(config: dict[Any, Any]) -> Any:
    return train_worker(config["job"])


def _summary(config: TrainConfig, result: Any, started: float) -> dict[str, Any]:
    outcome: dict[str, Any] = result.return_value
    if outcome["stopped_by"] is not None:
        raise RunError(outcome["stopped_by"])
    best = final_score(outcome["history"])
    checkpoint = result.get_best_checkpoint(SCORE, "max")
    assert checkpoint is not None
    scheme = uris.protocol_of(config.output.uri)
    return {
        "top1": best.get("top1"),
        "top5": best.get("top5"),
        "epochs": len(outcome["history"]),
        "images_per_s": round(mean_rate(outcome["history"]), 3),
        "num_failed": len(outcome["failed"]),
        "failed": [{"id": index, "error": error} for index, error in sorted(outcome["failed"].items())[:10]],
        "wall_time_s": round(time.monotonic() - started, 3),
        "checkpoint_uri": checkpoint.path if scheme == "file" else f"{scheme}://{checkpoint.path}",
        "output_uri": config.output.uri,
    }


def _normalized(config: TrainConfig) -> TrainConfig:
    output_uri = uris.normalize(config.output.uri)
    if not posixpath.basename(output_uri) or posixpath.dirname(output_uri).endswith(":/"):
        raise RequestError(f"output.uri {config.output.uri} names no folder below a bucket or root")
    return config.model_copy(update={"output": config.output.model_copy(update={"uri": output_uri})})


def _table(images: LabelledImages, class_names: list[str]) -> pa.Table:
    """`uri` and `target`."""
    return pa.table({"uri": images.table["uri"], "target": images.targets(class_names)})


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What has to be the same for two runs to share an output."""
    flat = _flat(config.model_dump(mode="json"))
    free = tuple(f"{section}." for section in FREE_SECTIONS)
    return {key: value for key, value in flat.items() if not key.startswith(free)}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
