"""The chain of `infer` over a sample, and how fast it ran once it was full."""

import logging
import time
from dataclasses import dataclass

import pyarrow as pa

from pipelines.benchmark.setup import Setup
from pipelines.inference.chain import describe, stream, writing
from pipelines.inference.progress import Progress
from pipelines.inference.request import make_decode
from pipelines.inference.source import TableSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WholeRate:
    """What the chain did with the sample.

    Attributes:
        num_ok: images with a row.
        num_failed: images without.
        first_file_s: from its start to the first file.
        elapsed_s: from its start to the last file.
        steady_images_per_s: from the first file, before which the replicas start, to the last but a tenth.
    """

    num_ok: int
    num_failed: int
    first_file_s: float
    elapsed_s: float
    steady_images_per_s: float


def measure_whole(setup: Setup) -> WholeRate:
    """Label the sample as `infer` would."""
    num_images = len(setup.sample)
    inputs = pa.table({"id": pa.array(range(num_images), pa.int64()), "uri": setup.sample.combine_chunks()})
    source, decode = TableSource(inputs, setup.rows_per_task), make_decode(setup.config, setup.facts)
    write = writing(setup.writer, setup.rows_per_file, setup.plan)
    log.info("%s", describe(num_images, setup.facts, setup.plan))
    num_ok, times = 0, [(0, time.monotonic())]
    with Progress(num_images) as progress:
        for receipt in stream(source, decode, setup.pickled_bundle, setup.options, setup.plan, write):
            progress.add(receipt["num_ok"], len(receipt["failures"]), len(receipt["files"]))
            num_ok += receipt["num_ok"]
            times.append((progress.num_ok + progress.num_failed, time.monotonic()))
    (_, started), (_, first), (rows, last) = times[0], times[1], times[-1]
    return WholeRate(num_ok, rows - num_ok, first - started, last - started, steady_rate(times))


def steady_rate(times: list[tuple[int, float]]) -> float:
    """Images per second between two moments at which the chain was as full.

    Args:
        times: images done and seconds, at the start and after each file.
    """
    total = times[-1][0]
    first = times[1]
    last = next(moment for moment in times if moment[0] >= 0.9 * total)
    if last[0] == first[0]:
        return total / (times[-1][1] - times[0][1])
    return (last[0] - first[0]) / (last[1] - first[1])
