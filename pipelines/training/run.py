"""Training and fine-tuning job: from a config to the best checkpoint, on Ray Train.

request (resolved config) -> trainer (workers and restarts) -> loop (each worker) -> summary and curves
"""

import logging
import posixpath
import time
from typing import Any

import ray
import ray.train
from pyarrow.fs import PyFileSystem
from ray.train import LoggingConfig
from ray.train.torch import TorchTrainer

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError, RunError, root_cause
from pipelines.outputs import Output
from pipelines.outputs.lease import Fence, Lease
from pipelines.runtime.malloc import KEEP_FREED_MEMORY
from pipelines.runtime.nodes import Node, can_grow, list_nodes, this_machine
from pipelines.runtime.ray_session import is_cluster_named, ray_session, refuse_if_ray_cannot_start
from pipelines.storage import uris
from pipelines.storage.bulk import list_keys
from pipelines.storage.filesystem import (
    open_filesystem,
    remove_folder,
    translate_storage_errors,
    write_bytes,
)
from pipelines.training.curves import draw_curves
from pipelines.training.failures import RestartPolicy
from pipelines.training.fenced_storage import FencedHandler
from pipelines.training.history import MODEL, SCORE, best_record, explain_choice, mean_rate
from pipelines.training.job import ImageSet, TrainJob
from pipelines.training.process_group import LOOPBACK_INTERFACE, OneMachineConfig
from pipelines.training.request import (
    CHECKPOINTS_FILE,
    TrainRequest,
    find_summary,
    has_checkpoint,
    normalize,
    resolve_request,
)
from pipelines.training.resources import WorkerResources, plan_workers
from pipelines.training.worker import run_worker

log = logging.getLogger(__name__)

CURVES_FILE = "curves.png"
# Ray Train names checkpoints `checkpoint_` plus the time.
CHECKPOINT_PREFIX = "checkpoint_"
MAX_NAMED_FAILURES = 10


def run(config: TrainConfig) -> dict[str, Any]:
    """Train to the last epoch and return the summary. Resume from the last checkpoint of the output, if it has one.

    Raises:
        RequestError: The request is wrong. Nothing has been computed.
        RunError: The run failed. Its checkpoints are kept, and the same command resumes from the last.
    """
    started = time.monotonic()
    config = normalize(config)
    summary = find_summary(config)
    if summary is not None:
        _mark_finished(Output(config.output.uri))
        log.info("nothing to do: %s holds a finished run", config.output.uri)
        return summary
    refuse_if_ray_cannot_start()
    # On a local Ray, the resources are known, so workers that do not fit are rejected before anything is read.
    resources = None if is_cluster_named() else plan_workers(config.scaling, [this_machine()], may_grow=False)
    output = Output(config.output.uri)
    found = output.find_run()
    request = resolve_request(config)
    with output.lease() as lease:
        with translate_storage_errors("write to", output.uri):
            lease.acquire()
        output.refuse_if_changed(found)
        lease.confirm()
        if lease.is_takeover:
            output.abort_unfinished_uploads()
        request.pin()
        _log_plan(request)
        with ray_session():
            nodes, may_grow = list_nodes(), can_grow()
            if not may_grow:
                _warn_if_memory_is_short(request, nodes)
            resources = resources or plan_workers(config.scaling, nodes, may_grow)
            result = _fit(request, resources, lease.fence)
        return _finish(request, result, started, lease)


def _mark_finished(output: Output) -> None:
    """Write the `_SUCCESS` file of a finished run that was killed before writing it."""
    if output.is_complete():
        return
    with output.lease() as lease, translate_storage_errors("write to", output.uri):
        lease.acquire()
        lease.confirm()
        output.mark_complete()


def _finish(request: TrainRequest, result: Any, started: float, lease: Lease) -> dict[str, Any]:
    """Write the curves, the history and `_SUCCESS`, and return the summary."""
    output = request.output
    outcome: dict[str, Any] = result.return_value
    if outcome["stopped_by"] is not None:
        raise RunError(outcome["stopped_by"])
    summary = _summary(request, result, started)
    best = best_record(outcome["history"])
    if "of" in best and request.config.optim.ema_decay:
        log.info("%s", explain_choice(best))
    lease.wait_for_stragglers()
    lease.confirm()
    _remove_orphaned_checkpoints(output, result, lease.fence)
    curves = draw_curves(outcome["metrics"], request.plan.steps_per_epoch)
    write_bytes(output.uri_of(CURVES_FILE), curves)
    output.write_run(request.describe() | {"history": outcome["history"], "summary": summary})
    output.write_progress({"is_running": False, **summary})
    lease.confirm()
    output.mark_complete()
    return summary


def _remove_orphaned_checkpoints(output: Output, result: Any, fence: Fence) -> None:
    """Remove checkpoints that interrupted attempts uploaded and Ray Train does not know about."""
    known = [checkpoint for checkpoint, _ in result.best_checkpoints] + [result.checkpoint]
    kept = {posixpath.basename(checkpoint.path.rstrip("/")) for checkpoint in known if checkpoint is not None}
    kept.add(CHECKPOINTS_FILE)  # a run that is killed before its `_run.json` goes on from what this names
    for name in output.list_names():
        # SeaweedFS still lists the folders of checkpoints that Ray Train has deleted, as empty ones.
        if name.startswith(CHECKPOINT_PREFIX) and name not in kept and list_keys(output.uri_of(name)):
            log.info("removing %s, which an interrupted attempt left behind", name)
            fence.check()
            remove_folder(output.uri_of(name))


def dry_run(config: TrainConfig) -> None:
    """Log the plan of a run: batches, steps, learning rates and memory. Write nothing.

    Raises:
        RequestError: The request is wrong.
    """
    config = normalize(config)
    if find_summary(config) is not None:
        log.info("nothing to do: %s holds a finished run", config.output.uri)
    request = resolve_request(config)
    _log_plan(request)
    if not is_cluster_named():
        _warn_if_memory_is_short(request, [this_machine()])


def _log_plan(request: TrainRequest) -> None:
    for line in request.plan.lines():
        log.info("%s", line)


def _warn_if_memory_is_short(request: TrainRequest, nodes: list[Node]) -> None:
    """Warn if CPU workers may run out of memory. Ray does not report the memory of GPUs."""
    scaling = request.config.scaling
    min_workers = scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[0]
    warning = None if scaling.use_gpu else request.plan.describe_memory_shortage(nodes, min_workers)
    if warning is not None:
        log.warning("%s", warning)


def _fit(request: TrainRequest, resources: WorkerResources, fence: Fence) -> Any:
    config = request.config
    sets = {
        name: ImageSet(ray.put(table), table.num_rows, request.sets[name].reader)
        for name, table in request.tables().items()
    }
    job = TrainJob(
        config=config,
        start=ray.put(request.start),
        train=sets["train"],
        validation=sets.get("validation"),
        num_threads=resources.num_threads,
        num_cpus_per_task=resources.num_cpus_per_task,
        fence=fence,
    )
    per_worker = resources.per_worker
    parent, name = posixpath.split(config.output.uri)
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type] # Ray's annotations do not allow for the return value
        train_loop_config={"job": job},
        torch_config=None if is_cluster_named() else OneMachineConfig(),
        # `scaling` mirrors Ray's fields, some of which Ray's annotations lack.
        scaling_config=ray.train.ScalingConfig(
            **config.scaling.model_dump(exclude={"num_cpus_per_worker"}) | {"resources_per_worker": per_worker}
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=open_filesystem(parent)[1],
            # Arrow's own clients would resolve endpoint, region and certificates differently, and skip the fence.
            storage_filesystem=PyFileSystem(FencedHandler(parent, fence)),
            failure_config=ray.train.FailureConfig(max_failures=config.failure.max_failures),
            # Ray Train keeps the best checkpoint by score, and always the last.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
            worker_runtime_env={"env_vars": _worker_variables(config.scaling.use_gpu)},
            callbacks=[RestartPolicy()],  # type: ignore[list-item] # the annotation is that of Ray Train v1
            # Ray Train logs the traceback of every error; `RestartPolicy` logs one line instead.
            logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
        ),
    )
    try:
        return trainer.fit()
    except SystemExit:  # raised by Ray Train on Ctrl-C, with exit status 0
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise _failure(error, request.output) from error


def _failure(error: ray.train.TrainingFailedError, output: Output) -> RequestError | RunError:
    """Convert the error of Ray Train to the error of the job."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, RequestError):
        return cause
    failures = getattr(error, "worker_failures", None) or {0: cause or error}
    first = failures[min(failures)]
    reason = str(first) if isinstance(first, RunError) else root_cause(first)
    if has_checkpoint(output):
        return RunError(f"{reason}; checkpoints are kept: run the same command to resume from the last")
    return RunError(f"{reason}; no checkpoint had been saved yet")


def _worker_variables(use_gpu: bool) -> dict[str, str]:
    memory = {} if use_gpu else KEEP_FREED_MEMORY
    return dict(memory) if is_cluster_named() else {**memory, **LOOPBACK_INTERFACE}


def _summary(request: TrainRequest, result: Any, started: float) -> dict[str, Any]:
    outcome: dict[str, Any] = result.return_value
    best = best_record(outcome["history"])
    validation_failed = sorted(outcome["validation_failed"].items())
    checkpoint = result.get_best_checkpoint(SCORE, "max")
    assert checkpoint is not None
    output_uri = request.config.output.uri
    scheme = uris.protocol_of(output_uri)
    failed = sorted(outcome["failed"].items())
    return {
        "top1": best.get("top1"),
        "top5": best.get("top5"),
        "epochs": len(outcome["history"]),
        "best_epoch": best.get("epoch"),
        "weights": best.get("of", MODEL),
        "images_per_s": round(mean_rate(outcome["history"]), 3),
        "num_failed": len(failed),
        "failed": _list_failed(request, "train", failed),
        "num_validation_failed": len(validation_failed),
        "validation_failed": _list_failed(request, "validation", validation_failed),
        "wall_time_s": round(time.monotonic() - started, 3),
        "checkpoint_uri": checkpoint.path if scheme == "file" else f"{scheme}://{checkpoint.path}",
        "output_uri": output_uri,
    }


def _list_failed(request: TrainRequest, name: str, failed: list[tuple[int, str]]) -> list[str]:
    """Return URI and error of the first `MAX_NAMED_FAILURES` failed images of a set."""
    image_uris = request.sets[name].table["uri"] if failed else []
    return [f"{image_uris[index]}: {error}" for index, error in failed[:MAX_NAMED_FAILURES]]
