"""Rendezvous of the training workers on one machine, without a port that other machines can reach.

torch's TCPStore listens on all interfaces and does not authenticate. On one machine, a FileStore serves the same
purpose.
"""

import uuid
from pathlib import Path
from typing import Any

import ray
import ray.train.torch

from pipelines.runtime.ray_compat import join_process_group

# By default, Gloo and NCCL bind to the address that the host name resolves to.
LOOPBACK_INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class OneMachineBackend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's torch backend, as of Ray 2.60, with a FileStore in place of the TCPStore."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the workers to one process group."""
        path = Path(ray.get_runtime_context().get_temp_dir()) / f"rendezvous-{uuid.uuid4().hex}"
        uses_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        backend = backend_config.backend or ("nccl" if uses_gpus else "gloo")
        join_process_group(worker_group, backend, init_method=path.as_uri(), timeout_s=backend_config.timeout_s)


class OneMachineConfig(ray.train.torch.TorchConfig):
    """`TorchConfig` for a Ray cluster of one machine."""

    @property
    def backend_cls(self) -> type[OneMachineBackend]:
        """Backend class that starts the process group."""
        return OneMachineBackend
