"""Label and embed images: from the request to `_SUCCESS`.

manifest (what) -> fetch (bytes) -> decode (uint8) -> predict (top-k, embedding) -> write (Parquet) -> commit
"""

import functools
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import ray

from pipelines.config.infer import InferConfig
from pipelines.engine.plan import ComputePlan, plan_compute
from pipelines.engine.quantization_sample import refuse_if_unable
from pipelines.engine.source import PendingInputs, cut_into_tasks, rows_per_task
from pipelines.errors import RunError, root_cause
from pipelines.inference.failures import FailureLimit
from pipelines.inference.request import (
    Places,
    Request,
    describe_run,
    find_places,
    make_decode,
    make_options,
    resolve_request,
)
from pipelines.models.process import ModelProcess
from pipelines.outputs import run_record
from pipelines.outputs.commit_log import CommitLog, withdraw_late_files
from pipelines.outputs.compaction import compact, plan_compaction
from pipelines.outputs.contents import complete_digests, write_digests
from pipelines.outputs.file_names import list_sizes
from pipelines.outputs.lease import Lease
from pipelines.outputs.writer import make_writer
from pipelines.runtime.nodes import this_machine
from pipelines.runtime.progress import Progress
from pipelines.runtime.ray_session import is_cluster_named, ray_session_beside
from pipelines.storage.filesystem import translate_storage_errors
from pipelines.storage.uploads import abort_unfinished_uploads

log = logging.getLogger(__name__)

CLIPPED = (
    "%d images are grey of more than 8 bits. timm's transform clips them to 0..255, so most of their pixels turn white "
    "(black where values lie between 0 and 1). Convert these images to 8 bits first if that is not what you want"
)


def run(config: InferConfig, model: ModelProcess) -> dict[str, Any]:
    """Label and embed every input with the model that `model` is resolving; returns the summary.

    Raises:
        RequestError: the request is wrong, before anything was computed.
        RunError: the run failed; what it committed stays, and the same command goes on from there.
    """
    started = time.monotonic()
    # On this machine's own Ray, what can't be scheduled is refused before anything is read.
    is_compiled = config.model.dtype == "int8"
    plan = None if is_cluster_named() else plan_compute(config.compute, [this_machine()], is_compiled)
    if is_compiled:
        refuse_if_unable(config.compute.use_gpu, is_cluster_named())
    places = find_places(config)
    with Lease(places.config.output.uri) as lease:
        try:
            return _run_with_lease(places, model, plan, lease, started)
        finally:
            if lease.is_lost:
                withdraw_late_files(lease.fence)


def _run_with_lease(
    places: Places, model: ModelProcess, plan: ComputePlan | None, lease: Lease, started: float
) -> dict[str, Any]:
    may_be_done = places.is_complete and places.config.failure.retry == "none"
    with ray_session_beside(at_once=not may_be_done) as wait_for_ray:
        # Ray Data takes half a second to import: here, Ray starts meanwhile.
        from pipelines.engine.autoscaling import plan_for_cluster
        from pipelines.engine.chain import describe

        request = resolve_request(places, model, lease)
        config = request.config
        limit = _limit_failures(request)
        publish = functools.partial(run_record.write_progress, config.output.uri, check=lease.fence.check)
        progress = Progress(request.manifest.num_inputs, request.num_done, publish)
        if request.is_finished:
            log.info("nothing to do: %s holds all %d images", config.output.uri, request.num_done)
            return _summarize(request, progress, limit, started)
        limit.check()
        if request.num_todo:
            wait_for_ray()
            plan = plan or plan_for_cluster(config.compute, config.model.dtype == "int8")
            log.info("%s", describe(request.num_todo, request.model, plan))
        commit_log = _begin(request, lease)
        digests: dict[str, str] = {}
        if request.num_todo:
            assert plan is not None
            with progress:
                digests = _execute(request, model.pickled_bundle(), plan, progress, limit, lease)
        _refuse_if_incomplete(request, progress)
        limit.check()
        digests |= _tidy(request, digests.keys(), wait_for_ray, commit_log, lease)
    summary = _summarize(request, progress, limit, started)
    _commit(request, digests, summary, commit_log, lease)
    if limit.num_failed:
        log.info("%d images failed: %s", limit.num_failed, limit.commonest())
    if progress.num_clipped:
        log.warning(CLIPPED, progress.num_clipped)
    return summary


def _limit_failures(request: Request) -> FailureLimit:
    num_inputs, max_fraction = request.manifest.num_inputs, request.config.failure.max_fraction
    return FailureLimit(max_fraction, num_inputs, request.num_done, request.done.failures)


def _begin(request: Request, lease: Lease) -> CommitLog:
    """Publish which files count, and remove the others; from here on, workers may write."""
    output_uri = request.config.output.uri
    commit_log = CommitLog(lease.fence)
    with translate_storage_errors("write to", output_uri):
        lease.confirm()
        if lease.is_takeover:
            abort_unfinished_uploads(output_uri)
        run_record.mark_incomplete(output_uri)
        commit_log.begin(request.done.names, request.done.removed)
    return commit_log


def _execute(
    request: Request, pickled_bundle: bytes, plan: ComputePlan, progress: Progress, limit: FailureLimit, lease: Lease
) -> dict[str, str]:
    """Do what is missing; returns the SHA-256 of each file written, by its name."""
    from pipelines.engine.chain import rows_per_file, stream, writing

    config = request.config
    decode = make_decode(config, request.model)
    options = make_options(config, plan, request.topk)
    num_rows = rows_per_task(request.num_todo, plan.batch_size, plan.num_threads, config.output.commit_rows)
    starts = cut_into_tasks(request.num_todo, num_rows, plan.batch_size, plan.num_threads)
    missing = PendingInputs(config.output.uri, request.manifest, request.done.ids, request.done.retried, starts)
    writer = make_writer(config.output.uri, request.model, request.topk, config.outputs.embedding, lease.fence)
    write = writing(writer, rows_per_file(request.num_todo, num_rows, config.output.commit_rows), plan)
    digests: dict[str, str] = {}
    try:
        for write_result in stream(missing, decode, pickled_bundle, options, plan, write):
            failures = list(write_result["failures"])
            digests |= zip(write_result["files"], write_result["digests"])
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
        return digests
    except ray.exceptions.RayError as error:
        raise RunError(f"{root_cause(error)}; what is done stays, and the same command goes on from there") from error


def _refuse_if_incomplete(request: Request, progress: Progress) -> None:
    num_new = progress.num_ok + progress.num_failed
    if num_new != request.num_todo:
        raise RunError(f"{request.num_todo} images went in, {num_new} rows came out; run the same command again")


def _tidy(
    request: Request, written: Collection[str], wait_for_ray: Callable[[], None], commit_log: CommitLog, lease: Lease
) -> dict[str, str]:
    """Leave each row in one file, and files of a good size; returns the SHA-256 of those made for it, by name."""
    output_uri = request.config.output.uri
    known = {*request.done.names, *written}
    lease.wait_for_stragglers()
    lease.confirm()
    sizes = _remove_strays(output_uri, known, commit_log)
    if gone := known - sizes.keys():
        raise RunError(
            f"{len(gone)} files of {output_uri} are gone, {min(gone)} among them; run the same command again"
        )
    groups = plan_compaction(sizes, lease.fence.epoch)
    if not groups:
        return {}
    wait_for_ray()
    merged = compact(groups, commit_log, lease)
    replaced = {name for group in groups for name in group.merge.sources}
    _remove_strays(output_uri, known - replaced | merged.keys(), commit_log)
    return merged


def _remove_strays(output_uri: str, known: Collection[str], commit_log: CommitLog) -> dict[str, int]:
    """Remove files that no one counts: of writes whose node or driver died before they were reported.

    Returns:
        The bytes of the files that stay, by name.
    """
    with translate_storage_errors("write to", output_uri, RunError):
        sizes = list_sizes(output_uri)
        strays = sizes.keys() - known
        for name in sorted(strays):
            log.info("%s is left from an interrupted attempt: removing it", name)
        commit_log.remove(strays)
    return {name: size for name, size in sizes.items() if name not in strays}


def _summarize(request: Request, progress: Progress, limit: FailureLimit, started: float) -> dict[str, Any]:
    num_inputs = request.manifest.num_inputs
    wall_time_s = time.monotonic() - started
    return {
        "num_inputs": num_inputs,
        "num_ok": num_inputs - limit.num_failed,
        "num_failed": limit.num_failed,
        "num_excluded": request.manifest.num_excluded,
        "num_resumed": num_inputs - request.num_todo,
        "num_retries": progress.num_retries,
        "num_clipped": progress.num_clipped,
        "num_files": len(list_sizes(request.config.output.uri)),
        "wall_time_s": round(wall_time_s, 3),
        "images_per_s": round(request.num_todo / wall_time_s, 3),
        "output_uri": request.config.output.uri,
    }


def _commit(
    request: Request, digests: dict[str, str], summary: dict[str, Any], commit_log: CommitLog, lease: Lease
) -> None:
    """Write `_files.json`, `_run.json` and the end of the commit log, then `_SUCCESS`."""
    output_uri = request.config.output.uri
    described = describe_run(request.config, request.model, request.identity, {"summary": summary})
    with translate_storage_errors("write to", output_uri, RunError):
        digests = complete_digests(output_uri, digests)
        steps: tuple[Callable[[], None], ...] = (
            functools.partial(write_digests, output_uri, digests),
            functools.partial(run_record.write_run, output_uri, described),
            functools.partial(commit_log.finish, digests),
            functools.partial(run_record.mark_complete, output_uri),
        )
        for step in steps:
            lease.confirm()
            step()
