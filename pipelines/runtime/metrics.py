"""Prometheus metrics of a run. Workers update them through Ray's metrics API, and each node's agent exports them.

Ray adds the prefix `ray_` to each name, and the suffix `_total` to counters. `cluster/grafana.json` is a dashboard for
these metrics.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge


class Metric(NamedTuple):
    """Description of a metric, and the names of its tags."""

    description: str
    tags: tuple[str, ...] = ()


COUNTERS = {
    "ecaray_images": Metric("Images whose rows were written, by status (ok or failed).", ("status",)),
    "ecaray_fetched_bytes": Metric("Encoded bytes of fetched images."),
    "ecaray_written_bytes": Metric("Bytes of written Parquet files."),
    "ecaray_stage_seconds": Metric(
        "Seconds that workers spent in a stage: fetch (waiting for the store), decode, forward or write.", ("stage",)
    ),
    "ecaray_batch_images": Metric("Images in forward passes."),
    "ecaray_batch_places": Metric("Batch slots in forward passes, including padding."),
    "ecaray_requests_sent_again": Metric("Retried requests to the store, for images and for written rows."),
}
GPU_MEMORY = "ecaray_gpu_memory_bytes"


def count(name: str, value: float, **tags: str) -> None:
    """Add `value` to one of `COUNTERS`. Does nothing outside Ray."""
    if value > 0 and _is_worker():
        _counter(name).inc(value, tags)


@contextlib.contextmanager
def timed(stage: str) -> Iterator[None]:
    """Add the duration of the block to `ecaray_stage_seconds` of a stage."""
    started = time.monotonic()
    try:
        yield
    finally:
        count("ecaray_stage_seconds", time.monotonic() - started, stage=stage)


def record_gpu_memory(num_bytes: int) -> None:
    """Set the gauge of the GPU memory in use, which includes the memory of the decoder and the driver."""
    if _is_worker():
        _gpu_memory().set(num_bytes)


def _is_worker() -> bool:
    # Stages also run without Ray, and importing it only to find out would take a second.
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@functools.cache
def _counter(name: str) -> "Counter":
    from ray.util.metrics import Counter

    metric = COUNTERS[name]
    return Counter(name, description=metric.description, tag_keys=metric.tags)


@functools.cache
def _gpu_memory() -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge(GPU_MEMORY, description="Bytes in use of the memory of a replica's GPU.")
