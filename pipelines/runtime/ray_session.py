"""Ray session of one job: a connection to an existing cluster, or a local Ray."""

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
from pipelines.runtime.signals import interrupt_on_sigterm

log = logging.getLogger(__name__)

# Ray's job manager sets the second variable in submitted jobs.
CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
# Length limit of a Unix socket's path (`sun_path` of unix(7)), without the terminating zero byte.
MAX_SOCKET_PATH = 107
DEFAULT_FOLDER = "/tmp"  # noqa: S108 - sockets need a short path; mkdtemp creates a private folder there
FOLDER_PREFIX, NUM_RANDOM_CHARACTERS = "ray-", 8
MAX_BASE_LENGTH = (
    MAX_SOCKET_PATH - len(ray_compat.LONGEST_SOCKET_SUFFIX) - len(f"/{FOLDER_PREFIX}") - NUM_RANDOM_CHARACTERS
)


def is_cluster_named() -> bool:
    """Return True if `RAY_ADDRESS` names a cluster, or if this process is a submitted job."""
    return any(os.environ.get(name) for name in CLUSTER_VARIABLES)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the named cluster, or start Ray on this machine, and shut down at the end of the block.

    Output of workers is copied to the driver's stdout, so print the summary after this block.

    Raises:
        RequestError: The named cluster does not answer, or no folder can hold the sockets of a local Ray.
        RunError: The local Ray did not start.
    """
    if is_cluster_named():
        _connect()
        try:
            _configure_driver()
            yield
        finally:
            ray.shutdown()  # only disconnects from the cluster
        return
    with _session_folder() as folder:
        _start(folder)
        try:
            _configure_driver()
            yield
        finally:
            _shut_down()


@contextlib.contextmanager
def ray_session_in_background(start_now: bool) -> Iterator[Callable[[], None]]:
    """Provide `ray_session` to a block that needs Ray only later.

    The block receives a function that waits until Ray is ready. It may be called more than once.

    Args:
        start_now: Start a local Ray in a thread while the block continues. If the block ends before Ray is ready, the
            processes started so far are killed, and this process must end with `os._exit`, since Ray's exit handlers
            would wait for a minute.

    Raises:
        RequestError: No folder can hold the sockets of a local Ray. The function also raises it, as `ray_session` does.
        RunError: Raised by the function, as by `ray_session`.
    """
    with contextlib.ExitStack() as stack:
        if start_now and not is_cluster_named() and _children_file(os.getpid(), os.getpid()).exists():
            local_ray = BackgroundRay(stack.enter_context(_session_folder()))
            stack.callback(local_ray.end)
            yield local_ray.wait_until_ready
        else:
            yield functools.cache(lambda: stack.enter_context(ray_session()))


def refuse_if_ray_cannot_start() -> None:
    """Check early that a folder can hold Ray's sockets, for a job that reads much data before it starts Ray.

    Raises:
        RequestError: No folder can hold them.
    """
    if not is_cluster_named():
        os.rmdir(_create_session_folder())


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """Create a private folder for Ray's sockets and logs, and remove it after the block unless the run failed."""
    folder = _create_session_folder()
    keep_logs = False
    try:
        yield folder
    except Exception as error:
        keep_logs = not isinstance(error, RequestError)
        raise
    finally:
        if keep_logs:
            log.info("Ray's logs are in %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _create_session_folder() -> Path:
    requested = os.environ.get("RAY_TMPDIR")
    candidates = [requested] if requested else [*filter(None, [os.environ.get("TMPDIR")]), DEFAULT_FOLDER]
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
        f"no folder can hold Ray's sockets ({'; '.join(reasons)}); "
        "set RAY_TMPDIR to a folder with a short path that you can write to"
    )


class BackgroundRay:
    """Local Ray, started by a thread.

    The thread lives until the end, because the processes that it starts would die with it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_over, self._is_done = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Wait until Ray is ready, and raise the error of a failed start."""
        self._is_done.wait()
        if self._error:
            raise self._error
        _configure_driver()

    def end(self) -> None:
        """Shut Ray down, or kill its processes if it has not finished starting."""
        if self._is_done.is_set():
            _shut_down()
        elif self._thread.native_id:
            threading.excepthook = _ignore_error  # threads of ray.init would print that they lost the connection
            _kill_descendants(os.getpid(), self._thread.native_id)
        self._is_over.set()

    def _run(self) -> None:
        try:
            _start(self._folder)
        except Exception as error:
            self._error = error
        self._is_done.set()
        self._is_over.wait()


def _ignore_error(_: threading.ExceptHookArgs) -> None:
    pass


def _start(folder: Path) -> None:
    """Start a local Ray on loopback, with a token that only its own processes know.

    Raises:
        RequestError: A folder cannot be written to.
        RunError: Ray did not start.
    """
    # Pass a token in the environment. Otherwise Ray writes one to HOME, which may be read-only, and which other Ray
    # clusters share.
    variables = (
        ray_compat.LOOPBACK_VARIABLES | ray_compat.NO_STATE_API_VARIABLES | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    )
    try:
        with _environment(variables), ray_compat.on_loopback():
            ray_compat.forget_auth_token()
            ray_compat.init_local(folder)
    except OSError as error:
        raise RequestError(f"Ray cannot start on this machine: {error}") from None
    except Exception as error:
        raise RunError(f"Ray did not start on this machine: {root_cause(error)}") from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block, and restore them and `RAY_AUTH_MODE`, which Ray sets, afterwards."""
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


def _configure_driver() -> None:
    interrupt_on_sigterm()  # ray.init installs its own handler
    _configure_ray_data()


def _shut_down() -> None:
    """Shut Ray down, but kill its autoscaler first, which saves a second.

    `ray.shutdown` waits that long for the autoscaler, which ignores SIGTERM. On one machine the autoscaler has nothing
    to scale, and no state to save.
    """
    for thread in threading.enumerate():  # Linux lists child processes by the thread that started them
        for child in _children(os.getpid(), thread.native_id or 0):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if ray_compat.AUTOSCALER_COMMAND in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, signal.SIGKILL)
    ray.shutdown()


def _kill_descendants(process_id: int, thread_id: int) -> None:
    """Kill all descendants of a thread, children before their parents, since orphans would be hard to find."""
    for child in _children(process_id, thread_id):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{child}/task"):
                _kill_descendants(child, int(thread))
            os.kill(child, signal.SIGKILL)


def _children(process_id: int, thread_id: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in _children_file(process_id, thread_id).read_text().split()]
    return []


def _children_file(process_id: int, thread_id: int) -> Path:
    """Return the file in which Linux lists the process IDs of a thread's children."""
    return Path(f"/proc/{process_id}/task/{thread_id}/children")


def _connect() -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    is_local = _listens_on_loopback_only(address)
    ray_compat.forget_auth_token()
    try:
        with _environment({}), ray_compat.on_loopback() if is_local else contextlib.nullcontext():
            if is_local:  # no other machine can impersonate this Ray to obtain the token in HOME
                ray_compat.use_auth_token_if_present()
            ray.init(logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:  # the last two: not the address of a cluster
        raise RequestError(f"no Ray cluster answers at {address}: {error}") from None


def _listens_on_loopback_only(address: str) -> bool:
    """Return True if `address` is a Ray head on this machine that listens on loopback only, such as `cluster.local`.

    Ray itself would look for the head at the address by which other machines reach this one.
    """
    host, _, port = address.rpartition(":")
    if host.strip("[]") not in LOOPBACK_HOSTS or not port.isdigit():
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=1).close()
    except OSError:
        return True
    return False


def _configure_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # jobs report their own progress, in images
    context.print_on_execution_start = False
    # Disable the thread in each worker that sums the pages of the process every second and locks its memory meanwhile.
    context.memory_usage_poll_interval_s = None
    ray_compat.silence_ray_data()
