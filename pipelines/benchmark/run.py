"""`jobs.benchmark`: every stage alone, then the chain of `infer` over a sample, on the machines at hand.

list (what) -> model -> Ray -> each stage alone, in workers -> the whole -> report
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray

from pipelines.benchmark.report import find_bounds, format_report
from pipelines.benchmark.stages import StageCost, measure_decode, measure_fetch, measure_forward, measure_write
from pipelines.config.benchmark import BenchmarkConfig
from pipelines.errors import RequestError, RunError, root_cause
from pipelines.inference.calibration import every_nth, read_sample, refuse_if_unable
from pipelines.inference.chain import describe, rows_per_file, stream, writing
from pipelines.inference.cluster import plan_for_cluster
from pipelines.inference.plan import ComputePlan, plan_compute
from pipelines.inference.progress import Progress
from pipelines.inference.request import make_decode, make_options, resolve_topk
from pipelines.inference.source import TableSource, rows_per_task
from pipelines.inference.write import PartWriter, make_writer
from pipelines.malloc import KEEP_FREED_MEMORY
from pipelines.models.bundle import ModelFacts
from pipelines.models.process import ModelProcess
from pipelines.nodes import list_nodes, this_machine
from pipelines.ray_session import is_cluster_named, ray_session
from pipelines.storage import uris
from pipelines.storage.filesystem import in_plain_words, is_there, list_names, remove, write_bytes
from pipelines.storage.listing import list_objects

log = logging.getLogger(__name__)

REPORT_FILE = "benchmark.json"
# Processes that read from the store at the same time while its ceiling is measured, at most.
MAX_READERS = 32


class Watch:
    """Seconds from one event of the start to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """The event `name` has come."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


def run(config: BenchmarkConfig, model: ModelProcess) -> dict[str, Any]:
    """Measure; prints the table, writes `benchmark.json` under the output, returns the summary.

    The rows of the sample are written under the output, as `infer` would, and removed at the end.

    Raises:
        RequestError: the request is wrong.
        RunError: a stage failed.
    """
    watch = Watch()
    is_compiled = config.model.dtype == "int8"
    plan = None if is_cluster_named() else plan_compute(config.compute, [this_machine()], is_compiled)
    if is_compiled:
        refuse_if_unable(config.compute.use_gpu, is_cluster_named())
    listing = list_objects(uris.normalize(config.input.uri), config.input.exclude)
    output_uri = _empty_output(config)
    watch.lap("list")
    sample = listing.table["uri"].take(every_nth(listing.table.num_rows, config.sample.num_images))
    facts = model.facts()
    if facts.dtype == "int8":
        positions = every_nth(len(sample), config.model.quantization.num_images)
        facts = model.quantized_facts(read_sample(sample.take(positions), make_decode(config, facts)))
    pickled_bundle = model.pickled_bundle()
    watch.lap("model, beside the listing")
    writer = make_writer(output_uri, facts, resolve_topk(config, facts), config.outputs.embedding)
    with ray_session():
        plan = plan or plan_for_cluster(config.compute, is_compiled)
        num_cpus = sum(node.num_cpus for node in list_nodes())
        watch.lap("Ray")
        try:
            costs = _measure_stages(config, facts, pickled_bundle, plan, sample.to_pylist(), writer, num_cpus)
            whole = _measure_whole(config, facts, pickled_bundle, plan, sample, writer)
        except ray.exceptions.RayError as error:
            raise RunError(root_cause(error)) from error
        finally:
            for name in list_names(output_uri):
                remove(uris.join(output_uri, name))
    summary = _summarize(config, facts, plan, costs, whole, watch, num_cpus)
    print(format_report(summary), flush=True)
    write_bytes(uris.join(output_uri, REPORT_FILE), json.dumps(summary, indent=2).encode())
    return summary


def _empty_output(config: BenchmarkConfig) -> str:
    output_uri = uris.normalize(config.output.uri)
    if uris.contains(uris.normalize(config.input.uri), output_uri):
        raise RequestError(f"output.uri {output_uri} lies inside input.uri")
    with in_plain_words("write to", output_uri):
        if is_there(output_uri) and set(list_names(output_uri)) - {REPORT_FILE}:
            raise RequestError(f"{output_uri} is not empty: a benchmark wants a place of its own")
        write_bytes(uris.join(output_uri, REPORT_FILE), b"{}")
    return output_uri


def _measure_stages(
    config: BenchmarkConfig,
    facts: ModelFacts,
    pickled_bundle: bytes,
    plan: ComputePlan,
    sample: list[str],
    writer: PartWriter,
    num_cpus: float,
) -> dict[str, StageCost]:
    """Each stage alone, one after the other, in processes as the run has them."""
    stage_s, commit_rows = config.sample.stage_s, config.output.commit_rows
    num_readers = _num_readers(num_cpus)
    log.info("measuring each stage alone, %.0f s each", stage_s)
    reads = [_remote(measure_fetch, 1, sample, config.input.max_bytes, stage_s) for _ in range(num_readers)]
    fetches: list[StageCost] = ray.get(reads)
    fetch = StageCost(*(sum(values) / num_readers for values in zip(*(asdict(cost).values() for cost in fetches))))
    decode = ray.get(_remote(measure_decode, 1, sample, make_decode(config, facts), stage_s))
    options = make_options(config, plan, resolve_topk(config, facts))
    forward = ray.get(
        ray.remote(_measure_replica)
        .options(
            num_cpus=plan.num_cpus_per_worker,
            num_gpus=plan.num_gpus_per_worker or None,
            runtime_env={"env_vars": {} if plan.num_gpus_per_worker else KEEP_FREED_MEMORY},
        )
        .remote(ray.put(pickled_bundle), options, plan.num_threads_per_worker, stage_s)
    )
    num_rows = rows_per_file(len(sample), rows_per_task(len(sample), plan.batch_size, commit_rows), commit_rows)
    write = ray.get(_remote(measure_write, 1, writer, num_rows, stage_s))
    return {"fetch": fetch, "decode": decode, "forward": forward, "write": write}


def _num_readers(num_cpus: float) -> int:
    return max(1, min(MAX_READERS, int(num_cpus)))


def _remote(measure: Callable[..., StageCost], num_cpus: float, *args: object) -> "ray.ObjectRef[StageCost]":
    reference: ray.ObjectRef[StageCost] = ray.remote(measure).options(num_cpus=num_cpus).remote(*args)
    return reference


def _measure_replica(pickled_bundle: bytes, *args: Any) -> StageCost:
    import pickle

    return measure_forward(pickle.loads(pickled_bundle), *args)  # noqa: S301 - our own driver's, never from a file


@dataclass(frozen=True)
class WholeRate:
    """What the chain did with the sample.

    Attributes:
        num_ok: images with a row.
        num_failed: images without.
        first_rows_s: from its start to the first file.
        elapsed_s: from its start to the last file.
        steady_images_per_s: from the first file, before which the replicas start, to the last but a tenth.
    """

    num_ok: int
    num_failed: int
    first_rows_s: float
    elapsed_s: float
    steady_images_per_s: float


def _measure_whole(
    config: BenchmarkConfig,
    facts: ModelFacts,
    pickled_bundle: bytes,
    plan: ComputePlan,
    sample: pa.Array,
    writer: PartWriter,
) -> WholeRate:
    """The chain of `infer` over the sample."""
    inputs = pa.table({"id": pa.array(range(len(sample)), pa.int64()), "uri": sample.combine_chunks()})
    num_rows = rows_per_task(inputs.num_rows, plan.batch_size, config.output.commit_rows)
    write = writing(writer, rows_per_file(inputs.num_rows, num_rows, config.output.commit_rows), plan)
    options = make_options(config, plan, resolve_topk(config, facts))
    log.info("%s", describe(inputs.num_rows, facts, plan))
    num_ok, times = 0, [(0, time.monotonic())]
    with Progress(inputs.num_rows) as progress:
        source = TableSource(inputs, num_rows)
        for receipt in stream(source, make_decode(config, facts), pickled_bundle, options, plan, write):
            progress.add(receipt["num_ok"], len(receipt["failures"]), len(receipt["files"]))
            num_ok += receipt["num_ok"]
            times.append((progress.num_ok + progress.num_failed, time.monotonic()))
    (_, started), (_, first), (rows, last) = times[0], times[1], times[-1]
    return WholeRate(num_ok, rows - num_ok, first - started, last - started, _steady_rate(times))


def _steady_rate(times: list[tuple[int, float]]) -> float:
    """Between two moments at which the chain was as full: the first file, and the one that made it nine tenths."""
    total = times[-1][0]
    first = times[1]
    last = next(moment for moment in times if moment[0] >= 0.9 * total)
    if last[0] == first[0]:
        return total / (times[-1][1] - times[0][1])
    return (last[0] - first[0]) / (last[1] - first[1])


def _summarize(
    config: BenchmarkConfig,
    facts: ModelFacts,
    plan: ComputePlan,
    costs: dict[str, StageCost],
    whole: WholeRate,
    watch: Watch,
    num_cpus: float,
) -> dict[str, Any]:
    bounds = find_bounds(costs, plan, num_cpus, _num_readers(num_cpus))
    start_s = watch.laps | {"first file": round(whole.first_rows_s, 2)}
    num_images = whole.num_ok + whole.num_failed
    lowest = bounds[0]
    return {
        "model": facts.name,
        "dtype": facts.dtype,
        "mode": config.preprocess.mode,
        "input_size": list(facts.transform.input_size),
        "num_cpus": num_cpus,
        "plan": asdict(plan),
        "stages": {name: asdict(cost) for name, cost in costs.items()},
        "ceilings": [asdict(bound) for bound in bounds],
        "binds": f"{lowest.stage}, by the {lowest.by}",
        "steady_images_per_s": round(whole.steady_images_per_s, 3),
        "share_of_ceiling": round(whole.steady_images_per_s / lowest.images_per_s, 4),
        "images_per_s": round(num_images / (sum(watch.laps.values()) + whole.elapsed_s), 3),
        "num_images": num_images,
        "num_failed": whole.num_failed,
        "start_s": start_s,
    }
