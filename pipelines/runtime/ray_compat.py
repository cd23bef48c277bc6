"""Every use of a private or undocumented Ray API, checked against the Ray version in `CHECKED_RAY_VERSION`.

After an upgrade of Ray in `requirements.lock`, review each function and constant here, then bump the version.
This module imports Ray inside its functions only: `import ray` takes 0.7 s, and `import ray.data` another 0.5 s.

Three other modules depend on the wording of Ray's messages: `logs.py` (noise and prefixes of worker lines), `errors.py`
(tracebacks and wrapper types) and `training/failures.py` (messages of lost workers).
"""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray.data

CHECKED_RAY_VERSION = "2.60.0"

SYSTEM_CONFIG = {
    # By default, Ray kills a worker after one idle second if there are more workers, actors included, than CPUs. On two
    # cores, every worker would die between two of its tasks, and each new one costs seconds of imports.
    "idle_worker_killing_time_threshold_ms": 120_000,
    # Without a dashboard nobody reads the metrics that every Ray process would collect.
    "enable_metrics_collection": False,
}
"""Entries of `ray_config_def.h`, for `ray.init(_system_config=...)` or as `RAY_<name>` for `ray start`."""

LOOPBACK_VARIABLES = {
    # Ray binds all services to loopback if it believes that the machine cannot join a cluster, as on Windows and macOS.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # The metrics endpoints of the autoscaler and the dashboard need no token, so they are disabled.
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""Environment variables that make a Ray head listen on loopback only. Ray reads the first when it is imported."""

NO_STATE_API_VARIABLES = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:0"}
"""Environment variables that disable Ray Train's queries to the state API.

After its driver ends, Ray Train queries the state API of the machine's Ray, which fails with a traceback if two are
running. A Ray without a dashboard has no state API, and nothing ever listens on port 0.
"""

LONGEST_SOCKET_SUFFIX = "/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1"
"""Longest path that Ray appends to its temporary folder for a socket, with a seven-digit process ID."""

AUTOSCALER_COMMAND = b"/ray/autoscaler/"
"""Part of the command line of the autoscaler process."""

HARMLESS_WARNINGS = {
    "ray._private.worker": "SIGTERM handler is not set",  # the job installs its own handler
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
    # The job's last line gives the reason, and Ray's advice to ignore the error would lose rows.
    "ray.data.exceptions": "Exception occurred in user code",
    "ray.data._internal.execution.streaming_executor_state": "An exception was raised from a task of operator",
}
"""Loggers of the driver, and the prefixes of their messages that require no action from the user."""


def hide_harmless_warnings() -> None:
    """Filter `HARMLESS_WARNINGS` out of the driver's log."""
    for name, prefix in HARMLESS_WARNINGS.items():
        logging.getLogger(name).addFilter(functools.partial(_lacks_prefix, prefix))


def _lacks_prefix(prefix: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(prefix)


def silence_ray_data() -> None:
    """Log only errors of Ray Data. Its logging is configured first, which would otherwise reset the levels later."""
    from ray.data._internal.logging import configure_logging

    configure_logging()
    for name in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)


def init_local(temp_dir: Path) -> None:
    """Start Ray on this machine with `SYSTEM_CONFIG`.

    Args:
        temp_dir: Folder for sockets and logs. `ray.init` has no public argument for it.
    """
    import ray

    ray.init(
        "local",
        include_dashboard=False,
        logging_level=logging.WARNING,
        _system_config=SYSTEM_CONFIG,
        _temp_dir=str(temp_dir),
    )


def forget_auth_token() -> None:
    """Make Ray read its authentication token again. It caches the token of the last cluster it connected to."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] # missing in Ray's stubs

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def use_auth_token_if_present() -> None:
    """Enable token authentication for the next connection if the environment or HOME holds a token."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Make Ray address this machine as 127.0.0.1 within the block.

    Setting `LOOPBACK_VARIABLES` has no effect in this process, since Ray has read them at import.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def count_cpus() -> float:
    """Return the number of CPUs that a local Ray will offer, which respects the limits of a container."""
    from ray._private.utils import get_num_cpus

    return get_num_cpus()


def count_visible_gpus() -> int:
    """Return the number of GPUs that a local Ray will offer, which respects `CUDA_VISIBLE_DEVICES`."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0
    num_gpus = manager.get_current_node_num_accelerators()
    visible = manager.get_current_process_visible_accelerator_ids()
    return num_gpus if visible is None else min(num_gpus, len(visible))


def worker_memory_bytes() -> float:
    """Return the memory in bytes that a local Ray leaves to workers, without its object store."""
    from ray._common.utils import get_system_memory
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    return float(get_system_memory() * (1 - DEFAULT_OBJECT_STORE_MEMORY_PROPORTION))


def has_autoscaler() -> bool:
    """Return True if an autoscaler may add nodes to the connected cluster."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        return True
    # Autoscaler v1 writes its report to this key. On a cluster without one, a monitor that launches no nodes writes it,
    # with node types derived from node IDs.
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    node_types = (report.get("node_type_mapping") or {}).values()
    return any(not node_type.startswith("node_") for node_type in node_types)


def range_dataset(num_rows: int, **task_options: Any) -> "ray.data.Dataset":
    """Return a dataset of the numbers from 0 to `num_rows` - 1 in the column `id`, with one task for each row.

    `ray.data.range` does the same, but its tasks request a whole CPU, which may never be free while actors hold CPUs.
    A stage that requests the same resources as `task_options` is fused with these tasks.

    Args:
        num_rows: Number of rows, and of tasks.
        task_options: Options of the tasks, such as `num_cpus` and `label_selector`.
    """
    import ray.data
    from ray.data._internal.datasource.range_datasource import RangeDatasource

    dataset: ray.data.Dataset = ray.data.read_datasource(
        RangeDatasource(num_rows, block_format="arrow", column_name="id"), override_num_blocks=num_rows, **task_options
    )
    return dataset


def join_process_group(worker_group: Any, backend: str, init_method: str, timeout_s: int) -> None:
    """Join the workers of Ray Train to one torch process group, as `_TorchBackend.on_start` does.

    Args:
        worker_group: Worker group that Ray Train passes to `Backend.on_start`.
        backend: Backend of `torch.distributed`, such as `gloo`.
        init_method: URL of the rendezvous. Ray Train's public options are limited to `env` and `tcp`.
        timeout_s: Timeout of collective operations in seconds.
    """
    import ray
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    worker_group.execute(_set_torch_distributed_env_vars)
    joining = [
        worker_group.execute_single_async(
            rank,
            _setup_torch_process_group,
            backend=backend,
            world_rank=rank,
            world_size=len(worker_group),
            init_method=init_method,
            timeout_s=timeout_s,
        )
        for rank in range(len(worker_group))
    ]
    ray.get(joining)
