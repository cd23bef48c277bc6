"""Ray for the length of one job: the cluster that is named, or this machine's own."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from pipelines.errors import RequestError
from pipelines.signals import end_as_interrupted

# Ray's job manager sets the second in a submitted job.
CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
# Ray ends a worker that was idle for a second where there are more of them, actors included, than CPUs. On two cores
# that is every worker between two of its tasks, and each new one costs seconds of imports. Nobody reads the metrics of
# a Ray without dashboard, which every one of its processes would gather.
RAYLET_CONFIG = {"idle_worker_killing_time_threshold_ms": 120_000, "enable_metrics_collection": False}


def is_cluster_named() -> bool:
    """Whether this process was told of a cluster, by `RAY_ADDRESS` or as a submitted job."""
    return any(os.environ.get(name) for name in CLUSTER_VARIABLES)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the named cluster, or start Ray on this machine; shut down at the end, whatever happens.

    Workers' prints reach the driver's stdout, so a summary is printed after this block only.

    Raises:
        RequestError: the named cluster does not answer.
    """
    if is_cluster_named():
        _connect()
    else:
        ray.init("local", include_dashboard=False, logging_level=logging.WARNING, _system_config=RAYLET_CONFIG)
    end_as_interrupted()
    try:
        _quieten_ray_data()
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    try:
        ray.init(logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:  # the last two: it is no address of a cluster
        raise RequestError(f"no Ray cluster answers at {os.environ.get('RAY_ADDRESS')}: {error}") from None


def _quieten_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job prints its own progress, in images
    context.print_on_execution_start = False
    # Off: a thread in each worker that sums the pages of the process every second, with the memory locked meanwhile.
    context.memory_usage_poll_interval_s = None
    # Ray Data sets its logger up on first use, with a level of its own.
    ray.data._internal.logging.configure_logging()
    for name in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
