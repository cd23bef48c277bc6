"""Measurement of the whole pipeline of `infer` over a sample."""

import logging
import time
from dataclasses import dataclass

import pyarrow as pa

from pipelines.benchmark.setup import Setup
from pipelines.engine.chain import write_stage
from pipelines.engine.source import TableSource
from pipelines.runtime.progress import Progress

log = logging.getLogger(__name__)

MIN_FILES = 6


@dataclass(frozen=True)
class WholeRate:
    """Result of running the whole pipeline over the sample.

    Attributes:
        num_ok: Number of images with a good row.
        num_failed: Number of images that failed.
        first_file_s: Seconds from the start to the first file.
        elapsed_s: Seconds from the start to the last file.
        steady_images_per_s: Rate from the first file, which includes the start of the replicas, to the first 90 % of
            the images; None if there are too few files to measure.
    """

    num_ok: int
    num_failed: int
    first_file_s: float
    elapsed_s: float
    steady_images_per_s: float | None


def measure_whole(setup: Setup) -> WholeRate:
    """Run the sample through the pipeline of `infer`."""
    num_images = len(setup.sample)
    inputs = setup.sample.add_column(0, "id", pa.array(range(num_images), pa.int64()))
    source = TableSource(inputs, setup.tasks.starts)
    add_write = write_stage(setup.writer, setup.rows_per_file, setup.plan)
    log.info("%s", setup.engine.describe(num_images))
    num_ok, times = 0, [(0, time.monotonic())]
    with Progress(num_images) as progress:
        for write_result in setup.engine.stream(source, setup.reader, setup.options, add_write):
            progress.add(write_result["num_ok"], len(write_result["failures"]), len(write_result["files"]))
            num_ok += write_result["num_ok"]
            times.append((progress.num_ok + progress.num_failed, time.monotonic()))
    (_, started), (_, first), (rows, last) = times[0], times[1], times[-1]
    return WholeRate(num_ok, rows - num_ok, first - started, last - started, steady_rate(times))


def steady_rate(times: list[tuple[int, float]]) -> float | None:
    """Return the rate between two moments at which the pipeline was equally full.

    Args:
        times: Number of images done and time in seconds, at the start and after each file.

    Returns:
        Images per second; None if there are too few files in between.
    """
    first = times[1]
    last = next(index for index, (done, _) in enumerate(times) if done >= 0.9 * times[-1][0])
    if last < MIN_FILES:
        return None
    return (times[last][0] - first[0]) / (times[last][1] - first[1])
