"""Ray head with an autoscaler, whose nodes Ray's fake provider starts on this machine. Ends when its stdin is closed.

    python -m tests.support.autoscaling_head FOLDER PORT

`ray start` detaches its processes. This program stays their ancestor, so that it can kill all of them.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

PR_SET_CHILD_SUBREAPER = 36
HEAD = "ray.head.default"  # the only name that the fake provider accepts
NODE_TYPES = {
    HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1},
}
PROVIDER = {
    "type": "fake_multinode",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
EMPTY: dict[str, Any] = {
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
}


def autoscaling_config(gcs_address: str) -> dict[str, Any]:
    """Return a config with at most one worker node, and with every key that Ray's monitor requires."""
    return EMPTY | {
        "cluster_name": "growing",
        "max_workers": 1,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1,
        "file_mounts_sync_continuously": False,
        "provider": PROVIDER | {"gcs_address": gcs_address},
        "available_node_types": NODE_TYPES,
        "head_node_type": HEAD,
    }


def main(folder: Path, port: str) -> None:
    """Start the head, print `up`, wait for the end of stdin, and kill all descendants."""
    config = folder / "autoscaler.yaml"
    config.write_text(json.dumps(autoscaling_config(f"{get_node_ip_address()}:{port}")))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    variables = os.environ | {"HOME": str(folder), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=0"]
    command += [f"--autoscaling-config={config}", f"--temp-dir={folder}/ray", "--include-dashboard=false"]
    try:
        subprocess.run(command, env=variables, check=True, stdout=sys.stderr)
        print("up", flush=True)
        sys.stdin.read()
    finally:
        while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(children[0]), signal.SIGKILL)
            os.waitpid(int(children[0]), 0)  # its orphaned children become ours


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
