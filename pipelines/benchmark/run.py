"""The job `benchmark`: measure each stage alone, then the whole pipeline of `infer` over a sample.

list -> model -> Ray -> each stage alone, in workers -> whole pipeline -> each stage again -> report

The speed of a shared machine drifts by 10 % and more within a minute. The stages are therefore measured before and
after the whole pipeline, and the mean counts.
"""

import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray

from pipelines.benchmark.report import GPU_DECODE, Bound, find_bounds, format_report
from pipelines.benchmark.setup import Setup, num_stage_images, num_whole_images
from pipelines.benchmark.stages import (
    StageCost,
    measure_decode,
    measure_device_decode,
    measure_fetch,
    measure_forward,
    measure_write,
)
from pipelines.benchmark.whole import WholeRate, measure_whole
from pipelines.config.benchmark import BenchmarkConfig
from pipelines.engine.engine import Engine
from pipelines.engine.quantization_sample import evenly_spaced
from pipelines.errors import RequestError, RunError, root_cause
from pipelines.inference.request import file_metadata, resolve_outputs
from pipelines.inputs.reader import Listing, ListRequest, Reader
from pipelines.inputs.registry import choose_reader
from pipelines.models.process import ModelProcess
from pipelines.outputs.columns import chosen_columns
from pipelines.outputs.schema import parts_schema
from pipelines.outputs.writer import PartWriter
from pipelines.runtime.malloc import KEEP_FREED_MEMORY
from pipelines.runtime.nodes import list_nodes
from pipelines.runtime.ray_session import ray_session, refuse_if_ray_cannot_start
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, list_names, remove, translate_storage_errors, write_bytes

log = logging.getLogger(__name__)
Cost = TypeVar("Cost", StageCost, StageCost | None)

REPORT_FILE, ROWS_FOLDER = "benchmark.json", "_rows"


class Stopwatch:
    """Seconds between the steps of the start-up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


def run(config: BenchmarkConfig, model: ModelProcess) -> dict[str, Any]:
    """Run the benchmark: print the report, write `benchmark.json` under the output, and return the summary.

    The rows of the sample are written under the output as `infer` would write them, and removed at the end.

    Raises:
        RequestError: The request is wrong.
        RunError: A stage failed.
    """
    stopwatch = Stopwatch()
    refuse_if_ray_cannot_start()
    engine = Engine(config, model)
    output_uri = _check_output(config)
    input_uri = uris.normalize(config.input.uri)
    reader = choose_reader(input_uri)
    listing = reader.list(ListRequest(input_uri, config.input.exclude, config.input.trust_list))
    stopwatch.lap("list")
    sample = _sample(listing, reader, num_stage_images(config))
    if engine.is_quantized:
        positions = engine.sample_positions(len(sample))
        engine.quantize(sample.take(positions).add_column(0, "id", pa.array(positions)), reader)
    facts = engine.facts
    engine.pickled_bundle()
    stopwatch.lap("model, beside the listing")
    rows_uri = uris.join(output_uri, ROWS_FOLDER)
    columns = chosen_columns(resolve_outputs(config, facts))
    writer = PartWriter(rows_uri, parts_schema(columns, facts), file_metadata(facts))
    with ray_session():
        plan = engine.plan
        num_cpus = sum(node.num_cpus for node in list_nodes())
        stopwatch.lap("Ray")
        setup = Setup(config, engine, num_cpus, reader, sample, writer)
        try:
            before = measure_stages(setup)
            expected = find_bounds(before, plan, num_cpus, setup.num_readers)[0].images_per_s
            whole = measure_whole(replace(setup, sample=_sample(listing, reader, num_whole_images(config, expected))))
            after = measure_stages(setup)
        except ray.exceptions.RayError as error:
            raise RunError(root_cause(error)) from error
        finally:
            _remove_all(rows_uri)
    costs = {name: _mean([before[name], after[name]]) for name in before}
    bounds = find_bounds(costs, plan, num_cpus, setup.num_readers)
    summary = _summarize(setup, costs, bounds, whole, stopwatch)
    print(format_report(summary), flush=True)
    with translate_storage_errors("write to", output_uri, RunError):
        write_bytes(uris.join(output_uri, REPORT_FILE), json.dumps(summary, indent=2).encode())
    return summary


def _sample(listing: Listing, reader: Reader, num_images: int) -> pa.Table:
    rows = listing.table.select(["uri", *reader.locators])
    return rows.take(evenly_spaced(listing.table.num_rows, num_images)).combine_chunks()


def _remove_all(folder_uri: str) -> None:
    with translate_storage_errors("write to", folder_uri, RunError):
        for name in list_names(folder_uri):
            remove(uris.join(folder_uri, name))
        if uris.is_local(folder_uri):
            shutil.rmtree(folder_uri, ignore_errors=True)


def _check_output(config: BenchmarkConfig) -> str:
    """Return the normalized output URI.

    Raises:
        RequestError: The output contains files that no benchmark wrote, or overlaps with the input.
    """
    output_uri = uris.normalize(config.output.uri)
    uris.refuse_overlap(output_uri, {"input.uri": config.input.uri})
    with translate_storage_errors("write to", output_uri):
        if exists(output_uri) and set(list_names(output_uri)) - {REPORT_FILE, ROWS_FOLDER}:
            raise RequestError(f"{output_uri} is not empty: set output.uri to a new folder for the benchmark")
    return output_uri


def measure_stages(setup: Setup) -> dict[str, StageCost]:
    """Measure each stage alone, one after the other, in the same kind of processes as in a run."""
    stage_s = setup.config.sample.stage_s
    log.info("measuring each stage alone, %.0f s each", stage_s)
    rows, decode = setup.sample, setup.engine.decode(setup.reader)
    # Each process starts at another row, so that no process reads what another one has just brought into a cache.
    starts = [number * rows.num_rows // setup.num_readers for number in range(setup.num_readers)]
    rotated = [pa.concat_tables([rows.slice(start), rows.slice(0, start)]) for start in starts]
    fetch_costs = [_remote(measure_fetch, part, decode, stage_s) for part in rotated]
    bundle_ref = ray.put(setup.engine.pickled_bundle())
    costs = {
        "fetch": _mean(ray.get(fetch_costs)),
        "decode": ray.get(_remote(measure_decode, rows, decode, stage_s)),
        "forward": _mean(ray.get([_measure_forward(setup, bundle_ref) for _ in range(setup.num_replicas)])),
        "write": ray.get(_remote(measure_write, setup.writer, setup.rows_per_file, stage_s)),
    }
    if decode.mode == "cuda" and (
        on_gpu := ray.get(_on_replica(setup, measure_device_decode, rows, decode, setup.options, stage_s))
    ):
        costs[GPU_DECODE] = on_gpu
    return costs


def _remote(measure: Callable[..., StageCost], *args: object) -> "ray.ObjectRef[StageCost]":
    reference: ray.ObjectRef[StageCost] = ray.remote(measure).options(num_cpus=1).remote(*args)
    return reference


def _mean(costs: list[StageCost]) -> StageCost:
    return StageCost(*(sum(values) / len(costs) for values in zip(*(asdict(cost).values() for cost in costs))))


def _measure_forward(setup: Setup, bundle_ref: "ray.ObjectRef[bytes]") -> "ray.ObjectRef[StageCost]":
    def measure(pickled_bundle: bytes) -> StageCost:
        bundle = pickle.loads(pickled_bundle)  # noqa: S301 - pickled by our own driver, never read from a file
        return measure_forward(bundle, options, num_threads, stage_s)

    options, num_threads = setup.options, setup.plan.num_threads_per_worker
    stage_s = setup.config.sample.stage_s
    return _on_replica(setup, measure, bundle_ref)


def _on_replica(setup: Setup, measure: Callable[..., Cost], *args: object) -> "ray.ObjectRef[Cost]":
    """Run a measurement in a process with the resources and environment of a replica."""
    plan = setup.plan
    # Declare the GPU here rather than in `options`. Only then does Ray end the process, and free its GPU memory, with
    # the task.
    task: Any = ray.remote(num_cpus=plan.num_cpus_per_worker, num_gpus=plan.num_gpus_per_worker)(measure)
    resources = dict(plan.resources_per_worker) or None
    runtime_env = {"env_vars": {} if plan.num_gpus_per_worker else KEEP_FREED_MEMORY}
    reference: ray.ObjectRef[Cost] = task.options(resources=resources, runtime_env=runtime_env).remote(*args)
    return reference


def _summarize(
    setup: Setup, costs: dict[str, StageCost], bounds: list[Bound], whole: WholeRate, stopwatch: Stopwatch
) -> dict[str, Any]:
    num_images = whole.num_ok + whole.num_failed
    lowest, steady = bounds[0], whole.steady_images_per_s
    return {
        "model": setup.engine.facts.name,
        "dtype": setup.engine.facts.dtype,
        "mode": setup.config.preprocess.mode,
        "input_size": list(setup.engine.facts.transform.input_size),
        "num_cpus": setup.num_cpus,
        "plan": asdict(setup.plan),
        "stages": {name: asdict(cost) for name, cost in costs.items()},
        "ceilings": [asdict(bound) for bound in bounds],
        "binds": f"{lowest.stage}, by the {lowest.by}",
        "steady_images_per_s": steady and round(steady, 3),
        "share_of_ceiling": steady and round(steady / lowest.images_per_s, 4),
        "images_per_s": round(num_images / (sum(stopwatch.laps.values()) + whole.elapsed_s), 3),
        "num_images": num_images,
        "num_failed": whole.num_failed,
        "start_s": stopwatch.laps | {"first file": round(whole.first_file_s, 2)},
    }
