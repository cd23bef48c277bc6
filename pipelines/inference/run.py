"""The job `infer`: label and embed images, from the request to `_SUCCESS`.

manifest -> fetch (bytes) -> decode (uint8) -> predict (top-k, embedding) -> write (Parquet) -> commit
"""

import functools
import logging
import time
from typing import Any

import ray

from pipelines.config.infer import InferConfig
from pipelines.engine.engine import Engine
from pipelines.engine.source import PendingInputs, plan_tasks, rows_per_file
from pipelines.errors import RunError, root_cause
from pipelines.inference.failures import FailureLimit
from pipelines.inference.request import (
    OutputState,
    Request,
    describe_run,
    file_metadata,
    find_output_state,
    resolve_request,
)
from pipelines.models.process import ModelProcess
from pipelines.outputs.columns import chosen_columns
from pipelines.outputs.commit import Commit
from pipelines.outputs.lease import Lease
from pipelines.outputs.schema import failed_schema, parts_schema
from pipelines.runtime.progress import Progress
from pipelines.runtime.ray_session import ray_session_in_background

log = logging.getLogger(__name__)

CLIPPED_WARNING = (
    "%d images are grayscale with more than 8 bits. timm's transform clips them to 0..255, which turns most pixels "
    "white (or black if values lie between 0 and 1). Convert these images to 8 bits first to avoid this"
)


def run(config: InferConfig, model: ModelProcess) -> dict[str, Any]:
    """Label and embed every input with the model that `model` is resolving, and return the summary.

    Raises:
        RequestError: The request is wrong. Nothing was computed.
        RunError: The run failed. Committed rows are kept, and the same command continues from there.
    """
    started = time.monotonic()
    engine = Engine(config, model)
    state = find_output_state(config)
    with state.output.claim() as lease:
        return _run_with_lease(state, engine, lease, started)


def _run_with_lease(state: OutputState, engine: Engine, lease: Lease, started: float) -> dict[str, Any]:
    may_be_done = state.is_complete and state.config.failure.retry == "none"
    with ray_session_in_background(start_now=not may_be_done) as wait_for_ray:
        # Importing Ray Data takes half a second. Do it while Ray starts.
        import pipelines.engine.chain  # noqa: F401

        request = resolve_request(state, engine, lease)
        limit = _limit_failures(request)
        publish = functools.partial(request.output.write_progress, check=lease.fence.check)
        progress = Progress(request.manifest.num_inputs, request.num_done, publish)
        if request.is_finished:
            log.info("nothing to do: %s already contains all %d images", request.output.uri, request.num_done)
            return _summarize(request, progress, limit, started)
        limit.check()
        if request.num_todo:
            wait_for_ray()
            log.info("%s", engine.describe(request.num_todo))
        commit = request.output.begin(lease, request.done)
        if request.num_todo:
            with progress:
                _execute(request, engine, commit, progress, limit, lease)
        _refuse_if_incomplete(request, progress)
        limit.check()
        commit.tidy(wait_for_ray)
    summary = _summarize(request, progress, limit, started)
    commit.finish(describe_run(request.config, request.model, request.identity, {"summary": summary}))
    if limit.num_failed:
        log.info("%d images failed: %s", limit.num_failed, limit.summarize())
    if progress.num_clipped:
        log.warning(CLIPPED_WARNING, progress.num_clipped)
    return summary


def _limit_failures(request: Request) -> FailureLimit:
    num_inputs, max_fraction = request.manifest.num_inputs, request.config.failure.max_fraction
    return FailureLimit(max_fraction, num_inputs, request.num_done, request.done.failures)


def _execute(
    request: Request, engine: Engine, commit: Commit, progress: Progress, limit: FailureLimit, lease: Lease
) -> None:
    """Compute and write the missing rows."""
    from pipelines.engine.chain import write_stage

    plan, commit_rows = engine.plan, request.config.output.commit_rows
    tasks = plan_tasks(request.num_todo, plan.batch_size, plan.num_threads, commit_rows)
    source = PendingInputs(request.manifest, request.done.ids, request.done.retried, tasks.starts)
    columns, carried = chosen_columns(request.outputs), request.manifest.carried
    writer = commit.writer(
        parts_schema(columns, request.model, carried), file_metadata(request.model), failed_schema(carried)
    )
    add_write = write_stage(writer, rows_per_file(request.num_todo, tasks.num_rows, commit_rows), plan)
    try:
        for write_result in engine.stream(source, request.manifest.reader, engine.options(columns), add_write):
            commit.add(write_result)
            failures = list(write_result["failures"])
            progress.add(
                write_result["num_ok"],
                len(failures),
                num_files=len(write_result["files"]),
                num_retries=write_result["num_retries"],
                num_clipped=write_result["num_clipped"],
            )
            limit.add(write_result["num_ok"], failures)
            limit.check()
            lease.check()
    except ray.exceptions.RayError as error:
        raise RunError(
            f"{root_cause(error)}; committed rows are kept: run the same command again to continue from there"
        ) from error


def _refuse_if_incomplete(request: Request, progress: Progress) -> None:
    num_new = progress.num_ok + progress.num_failed
    if num_new != request.num_todo:
        raise RunError(
            f"the run wrote {num_new} rows for {request.num_todo} images: run the same command again to complete it"
        )


def _summarize(request: Request, progress: Progress, limit: FailureLimit, started: float) -> dict[str, Any]:
    num_inputs = request.manifest.num_inputs
    wall_time_s = time.monotonic() - started
    return {
        "num_inputs": num_inputs,
        "num_ok": num_inputs - limit.num_failed,
        "num_failed": limit.num_failed,
        "num_excluded": request.manifest.info.num_excluded,
        "num_resumed": num_inputs - request.num_todo,
        "num_retries": progress.num_retries,
        "num_clipped": progress.num_clipped,
        "num_files": len(request.output.list_sizes()),
        "wall_time_s": round(wall_time_s, 3),
        "images_per_s": round(request.num_todo / wall_time_s, 3),
        "output_uri": request.output.uri,
    }
