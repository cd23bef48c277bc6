"""Deployment files, checked against the schemas of Ray, KubeRay and our own jobs."""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.validation import parse_and_validate_excludes
from ray.autoscaler._private.util import fillout_defaults, validate_config
from ray.runtime_env import RuntimeEnv

from cluster.local.digits import write_digits
from pipelines.config.infer import InferConfig
from pipelines.config.parse import parse_config
from pipelines.config.train import TrainConfig
from pipelines.runtime.metrics import COUNTERS, GPU_MEMORY
from tests.support.infer import REPOSITORY, run_command

CLUSTER = REPOSITORY / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
# Fields of the custom resource definitions (v1) of KubeRay 1.5.
JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "preRunningDeadlineSeconds",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "rayVersion",
    "suspend",
    "upgradeStrategy",
    "workerGroupSpecs",
}
AUTOSCALER_FIELDS = {
    "env",
    "envFrom",
    "idleTimeoutSeconds",
    "image",
    "imagePullPolicy",
    "resources",
    "securityContext",
    "upscalingMode",
    "version",
    "volumeMounts",
}
FAULT_TOLERANCE_FIELDS = {"externalStorageNamespace", "redisAddress", "redisPassword", "redisUsername"}
GROUP_FIELDS = {
    "groupName",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "resources",
    "scaleStrategy",
    "suspend",
    "template",
}
# Metrics in the dashboard that Ray and Ray Data export themselves.
RAY_METRICS = {"ray_data_num_external_inqueue_blocks", "ray_data_obj_store_mem_used", "ray_node_gpus_utilization"}


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_aws_config_is_valid_for_rays_cluster_launcher() -> None:
    config = fillout_defaults(load(CLUSTER / "aws.yaml"))
    validate_config(config)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert sum(node["max_workers"] for name, node in types.items() if name != "head") <= config["max_workers"]
    assert all("--num-cpus=0" in line for line in config["head_start_ray_commands"] if "--head" in line)
    assert all((REPOSITORY / local).exists() for local in config["file_mounts"].values() if local.startswith("./"))


def test_deployments_contain_no_secrets() -> None:
    for path in [*KUBERAY, CLUSTER / "aws.yaml", CLUSTER / "Dockerfile", CLUSTER / "runtime_env.yaml"]:
        assert not re.search(r"AKIA|(SECRET_ACCESS_KEY|AUTH_TOKEN|PASSWORD)\s*[:=]\s*[\"']?\w", path.read_text())


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_files_have_known_fields_only(path: Path) -> None:
    document = load(path)
    assert document["apiVersion"] == "ray.io/v1"
    spec = cluster_spec(document)
    if document["kind"] == "RayJob":
        assert document["spec"].keys() <= JOB_FIELDS
        assert document["spec"].keys() >= {"backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    assert spec.keys() <= CLUSTER_FIELDS
    assert spec["autoscalerOptions"].keys() <= AUTOSCALER_FIELDS
    assert spec["gcsFaultToleranceOptions"].keys() <= FAULT_TOLERANCE_FIELDS
    assert spec["headGroupSpec"].keys() <= GROUP_FIELDS - {"groupName", "replicas", "minReplicas", "maxReplicas"}
    assert all(group.keys() <= GROUP_FIELDS for group in spec["workerGroupSpecs"])


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_clusters_are_secure_and_consistent(path: Path) -> None:
    spec = cluster_spec(load(path))
    assert spec["rayVersion"] == version("ray")
    assert (spec["authOptions"], spec["autoscalerOptions"]["version"]) == ({"mode": "token"}, "v2")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod, only = group["template"]["spec"], container(group)
        assert pod["securityContext"]["runAsNonRoot"]
        assert only["image"] == container(groups[0])["image"]
        assert only["resources"]["requests"] == only["resources"]["limits"]
        annotations = group["template"]["metadata"]["annotations"]
        assert {"containerPort": int(annotations["prometheus.io/port"]), "name": "metrics"} in only["ports"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups[1:])


def gpus_of(spec: dict[str, Any]) -> int:
    limits = [(group["maxReplicas"], container(group)["resources"]["limits"]) for group in spec["workerGroupSpecs"]]
    return sum(replicas * int(limit.get("nvidia.com/gpu", 0)) for replicas, limit in limits)


def most(num_workers: int | tuple[int, int] | None) -> int:
    return num_workers[1] if isinstance(num_workers, tuple) else num_workers or 1


def test_entrypoints_use_all_gpus_of_their_clusters(tmp_path: Path) -> None:
    write_digits(str(tmp_path / "train"), str(tmp_path / "held-out"))
    local = ["--data.train.uri", str(tmp_path / "train"), "--data.validation.uri", str(tmp_path / "held-out")]
    jobs = [load(path)["spec"] for path in KUBERAY if load(path)["kind"] == "RayJob"]
    assert len(jobs) == 2
    for spec in jobs:
        python, dash_m, job, *arguments = shlex.split(spec["entrypoint"])
        assert (python, dash_m) == ("python", "-m")
        # A dry run of training reads its data.
        more = [*local, "--output.uri", str(tmp_path / "run")] if job == "jobs.train" else []
        done = run_command(job, *arguments, *more, "--dry-run")
        assert done.returncode == 0, done.stderr
        if job == "jobs.train":
            num_workers = most(parse_config(TrainConfig, arguments).scaling.num_workers)
        else:
            num_workers = most(parse_config(InferConfig, arguments).compute.num_workers)
        assert num_workers == gpus_of(spec["rayClusterSpec"])


def test_runtime_environment_is_valid() -> None:
    found = load(CLUSTER / "runtime_env.yaml")
    RuntimeEnv(**found)
    assert parse_and_validate_excludes(found["excludes"]) == found["excludes"]


def test_image_installs_locked_packages_and_does_not_run_as_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[-2] for line in lines if line.startswith("COPY")]
    assert all((REPOSITORY / name).exists() for name in copied)
    assert any("--constraints requirements.lock" in line for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]


def test_dashboard_covers_all_exported_metrics() -> None:
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    ours = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{GPU_MEMORY}"}
    assert shown == ours | RAY_METRICS
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
