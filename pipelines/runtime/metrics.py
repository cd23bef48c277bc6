"""What a run tells Prometheus, by Ray's metrics: counters that the workers keep and every node's agent exports.

Ray puts `ray_` before each name and `_total` behind it. `cluster/grafana.json` draws them.
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
    """What a name stands for, and the tags that its values carry."""

    description: str
    tags: tuple[str, ...] = ()


COUNTERS = {
    "ecaray_images": Metric("Images whose rows were written, by status: ok or failed.", ("status",)),
    "ecaray_fetched_bytes": Metric("Encoded bytes of the images fetched."),
    "ecaray_written_bytes": Metric("Bytes of the Parquet files written."),
    "ecaray_stage_seconds": Metric(
        "Seconds that workers spent in a stage: fetch (waiting for the store), decode, forward or write.", ("stage",)
    ),
    "ecaray_batch_images": Metric("Images in the forward passes."),
    "ecaray_batch_places": Metric("Places in the forward passes, padding included."),
    "ecaray_requests_sent_again": Metric("Requests to the store that were sent again, of images and rows written."),
}
GPU_MEMORY = "ecaray_gpu_memory_bytes"


def count(name: str, value: float, **tags: str) -> None:
    """Add to one of `COUNTERS`; outside of Ray, nothing."""
    if value > 0 and _is_worker():
        _counter(name).inc(value, tags)


@contextlib.contextmanager
def timed(stage: str) -> Iterator[None]:
    """Add the seconds of a `with` block to a stage's."""
    started = time.monotonic()
    try:
        yield
    finally:
        count("ecaray_stage_seconds", time.monotonic() - started, stage=stage)


def show_gpu_memory(num_bytes: int) -> None:
    """Tell how much of its GPU's memory is taken, by the decoder and the driver too."""
    if _is_worker():
        _gpu_memory().set(num_bytes)


def _is_worker() -> bool:
    # The stages run without Ray, too, where importing it would cost a second.
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@functools.cache
def _counter(name: str) -> "Counter":
    from ray.util.metrics import Counter

    metric = COUNTERS[name]
    return Counter(name, description=metric.description, tag_keys=metric.tags)


@functools.cache
def _gpu_memory() -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge(GPU_MEMORY, description="Bytes taken of a replica's GPU's memory.")
