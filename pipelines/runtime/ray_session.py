"""Ray for the length of one job: the cluster that is named, or this machine's own."""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ray

from pipelines.errors import RequestError, RunError, root_cause
from pipelines.runtime import ray_compat
from pipelines.runtime.signals import end_as_interrupted

log = logging.getLogger(__name__)

# Ray's job manager sets the second in a submitted job.
CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
# Length limit of a Unix socket's path (`sun_path` of unix(7)), without the terminating zero byte.
MAX_SOCKET_PATH = 107
DEFAULT_FOLDER = "/tmp"  # noqa: S108 - sockets need a short path; what lies there is a folder of this user's own
FOLDER_PREFIX, NUM_RANDOM_CHARACTERS = "ray-", 8
MAX_BASE_LENGTH = (
    MAX_SOCKET_PATH - len(ray_compat.LONGEST_SOCKET_SUFFIX) - len(f"/{FOLDER_PREFIX}") - NUM_RANDOM_CHARACTERS
)


def is_cluster_named() -> bool:
    """Whether this process was told of a cluster, by `RAY_ADDRESS` or as a submitted job."""
    return any(os.environ.get(name) for name in CLUSTER_VARIABLES)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the named cluster, or start Ray on this machine; shut down at the end, whatever happens.

    Workers' prints reach the driver's stdout, so a summary is printed after this block only.

    Raises:
        RequestError: the named cluster does not answer, or no folder here can hold Ray's sockets.
        RunError: Ray did not start.
    """
    if is_cluster_named():
        _connect()
        try:
            _settle()
            yield
        finally:
            ray.shutdown()  # to its processes, where this one started them, the end of a job is nothing
        return
    with _session_folder() as folder:
        _start(folder)
        try:
            _settle()
            yield
        finally:
            _shut_down()


@contextlib.contextmanager
def ray_session_beside(at_once: bool) -> Iterator[Callable[[], None]]:
    """`ray_session`, for a block that has other things to do until it calls what it is given, once or more often.

    Args:
        at_once: start this machine's Ray while the block goes on. Where the block ends before Ray is up, its processes
            are killed half started, and this one has to end by `os._exit`: Ray's exit handlers would wait a minute.

    Raises:
        RequestError: no folder here can hold Ray's sockets; from the call, as `ray_session`.
        RunError: from the call, as `ray_session`.
    """
    with contextlib.ExitStack() as stack:
        if at_once and not is_cluster_named() and _path_of_children(os.getpid(), os.getpid()).exists():
            start = RayStart(stack.enter_context(_session_folder()))
            stack.callback(start.end)
            yield start.finish
        else:
            yield functools.cache(lambda: stack.enter_context(ray_session()))


def refuse_if_ray_cannot_start() -> None:
    """Look for a folder for Ray's sockets now, for a job that reads much before it starts Ray.

    Raises:
        RequestError: no folder here can hold them.
    """
    if not is_cluster_named():
        os.rmdir(_make_session_folder())


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, for Ray's sockets and logs. It stays where the block fails."""
    folder = _make_session_folder()
    is_wanted = False
    try:
        yield folder
    except Exception as error:
        is_wanted = not isinstance(error, RequestError)
        raise
    finally:
        if is_wanted:
            log.info("Ray's logs are in %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _make_session_folder() -> Path:
    said = os.environ.get("RAY_TMPDIR")
    candidates = [said] if said else [*filter(None, [os.environ.get("TMPDIR")]), DEFAULT_FOLDER]
    reasons: list[str] = []
    for base in map(os.path.abspath, candidates):
        if len(os.fsencode(base)) > MAX_BASE_LENGTH:
            reasons.append(f"{base} is longer than {MAX_BASE_LENGTH} bytes")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
    raise RequestError(
        f"Ray finds no folder for its sockets ({'; '.join(reasons)}): "
        "set RAY_TMPDIR to a folder with a short path that you can write to"
    )


class RayStart:
    """This machine's Ray, started by a thread that stays until the end: what it starts would die with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
            _start(self._folder)
        except Exception as error:
            self._error = error
        self._is_done.set()
        self._is_over.wait()


def _say_nothing(_: threading.ExceptHookArgs) -> None:
    pass


def _start(folder: Path) -> None:
    """Start this machine's Ray, on loopback, with a token that only its processes know.

    Raises:
        RequestError: a folder cannot be written to.
        RunError: Ray did not come up.
    """
    # A token in the environment: Ray would write one to HOME, which may not be writable, and which other Rays share.
    variables = (
        ray_compat.LOOPBACK_VARIABLES | ray_compat.NO_STATE_API_VARIABLES | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    )
    try:
        with _variables(variables), ray_compat.on_loopback():
            ray_compat.forget_auth_token()
            ray_compat.init_local(folder)
    except OSError as error:
        raise RequestError(f"Ray cannot start on this machine: {error}") from None
    except Exception as error:
        raise RunError(f"Ray did not start on this machine: {root_cause(error)}") from error


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a block and the processes that it starts, and undo what Ray sets there."""
    before = {name: os.environ.get(name) for name in (*values, "RAY_AUTH_MODE")}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
                if ray_compat.AUTOSCALER_COMMAND in Path(f"/proc/{child}/cmdline").read_bytes():
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
    address = os.environ.get("RAY_ADDRESS", "")
    is_local = _listens_on_loopback_only(address)
    ray_compat.forget_auth_token()
    try:
        with _variables({}), ray_compat.on_loopback() if is_local else contextlib.nullcontext():
            if is_local:  # no other machine can pose as this Ray to get the token in HOME
                ray_compat.use_auth_token_if_present()
            ray.init(logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:  # the last two: it is no address of a cluster
        raise RequestError(f"no Ray cluster answers at {address}: {error}") from None


def _listens_on_loopback_only(address: str) -> bool:
    """Return whether Ray's head on this machine, such as that of `cluster.local`, has no other address.

    Ray itself would look for it at the address by which other machines reach this one.
    """
    host, _, port = address.rpartition(":")
    if host.strip("[]") not in LOOPBACK_HOSTS or not port.isdigit():
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=1).close()
    except OSError:
        return True
    return False


def _quieten_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job prints its own progress, in images
    context.print_on_execution_start = False
    # Off: a thread in each worker that sums the pages of the process every second, with the memory locked meanwhile.
    context.memory_usage_poll_interval_s = None
    ray_compat.silence_ray_data()
