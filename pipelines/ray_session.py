"""Ray for the length of one job: the cluster that is named, or this machine's own."""

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from pipelines.errors import RequestError
from pipelines.signals import end_as_interrupted

# Ray's job manager sets the second in a submitted job.
CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
AUTOSCALER = b"/ray/autoscaler/"  # in the command line of its process
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
        _start()
    try:
        _settle()
        yield
    finally:
        if is_cluster_named():
            ray.shutdown()  # to its processes, where this one started them, the end of a job is nothing
        else:
            _shut_down()


@contextlib.contextmanager
def ray_session_beside(at_once: bool) -> Iterator[Callable[[], None]]:
    """`ray_session`, for a block that has other things to do until it calls what it is given, once or more often.

    Args:
        at_once: start this machine's Ray while the block goes on. Where the block ends before Ray is up, its processes
            are killed half started, and this one has to end by `os._exit`: Ray's exit handlers would wait a minute.

    Raises:
        RequestError: from the call, as `ray_session`.
    """
    with contextlib.ExitStack() as stack:
        if at_once and not is_cluster_named() and _path_of_children(os.getpid(), os.getpid()).exists():
            start = RayStart()
            stack.callback(start.end)
            yield start.finish
        else:
            yield functools.cache(lambda: stack.enter_context(ray_session()))


class RayStart:
    """This machine's Ray, started by a thread that stays until the end: what it starts would die with it."""

    def __init__(self) -> None:
        self._is_over, self._is_done = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until Ray is up."""
        self._is_done.wait()
        if self._error:
            raise self._error
        _settle()

    def end(self) -> None:
        """Shut Ray down, or kill what there is of it."""
        if self._is_done.is_set():
            _shut_down()
        elif self._thread.native_id:
            threading.excepthook = _say_nothing  # ray.init's threads would print that they lost their Ray
            _kill_children(os.getpid(), self._thread.native_id)
        self._is_over.set()

    def _run(self) -> None:
        try:
            _start()
        except Exception as error:
            self._error = error
        self._is_done.set()
        self._is_over.wait()


def _say_nothing(_: threading.ExceptHookArgs) -> None:
    pass


def _start() -> None:
    ray.init("local", include_dashboard=False, logging_level=logging.WARNING, _system_config=RAYLET_CONFIG)


def _settle() -> None:
    end_as_interrupted()  # ray.init has handlers of its own
    _quieten_ray_data()


def _shut_down() -> None:
    """End Ray, without the second for which its shutdown waits for an autoscaler that does not answer SIGTERM.

    One machine's autoscaler has nothing to scale, and nothing to save.
    """
    for thread in threading.enumerate():  # a process belongs to the thread that started it
        for child in _children(os.getpid(), thread.native_id or 0):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if AUTOSCALER in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, signal.SIGKILL)
    ray.shutdown()


def _kill_children(process_id: int, thread_id: int) -> None:
    """Kill what a thread started and all below, the last first: those whose parent is gone would be hard to find."""
    for child in _children(process_id, thread_id):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{child}/task"):
                _kill_children(child, int(thread))
            os.kill(child, signal.SIGKILL)


def _children(process_id: int, thread_id: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in _path_of_children(process_id, thread_id).read_text().split()]
    return []


def _path_of_children(process_id: int, thread_id: int) -> Path:
    """Of Linux: the process ids of a thread's children."""
    return Path(f"/proc/{process_id}/task/{thread_id}/children")


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
