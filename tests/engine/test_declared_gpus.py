"""Pipeline on GPUs that are declared to Ray but do not exist: replicas hold one each and compute on the CPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local.ray_head import RayHead, ray_head
from pipelines.config.benchmark import BenchmarkConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.infer import InferConfig
from pipelines.errors import RunError
from pipelines.models.accelerators import TEST_DEVICE_VARIABLE, replica_accelerator
from tests.conftest import REPOSITORY
from tests.support.embeddings import cosines
from tests.support.infer import read_kind

NAME = "ecaresnet26t"
NUM_GPUS = 2
BATCH_SIZE = 16
MODES = ("exact", "fast", "cuda")


@pytest.fixture(scope="module")
def gpu_head() -> Iterator[RayHead]:
    """Run a Ray head that declares GPUs it does not have."""
    with ray_head(2, {"PYTHONPATH": str(REPOSITORY)}, num_gpus=NUM_GPUS) as running:
        yield running


@pytest.fixture
def sections(photographs: Path, tmp_path: Path, telling_weights: Callable[[str], Path]) -> dict[str, Any]:
    return {
        "input": {"uri": str(photographs)},
        "output": {"uri": str(tmp_path / "out")},
        "model": {"name": NAME, "weights": str(telling_weights(NAME))},
        "preprocess": {"image_size": 64},
        "compute": {"batch_size": BATCH_SIZE},
        "failure": {"max_fraction": 1.0},
    }


def run_on(
    head: RayHead, job: Callable[..., dict[str, Any]], config: Any, device: str | None = "cpu"
) -> dict[str, Any]:
    """Run a job on a head, as `ray job submit` would with the test device in its runtime environment."""
    variables = {} if device is None else {TEST_DEVICE_VARIABLE: device}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head.address)
        patch.setenv("HOME", str(head.home))
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": variables}}))
        return job(config)


def infer_on(head: RayHead, sections: dict[str, Any], name: str, mode: str, use_gpu: bool) -> str:
    """Label the photographs with a preprocessing mode, and return the URI of the output."""
    from jobs.infer import label_and_embed

    output_uri = f"{sections['output']['uri']}-{name}"
    config = InferConfig.model_validate(
        sections
        | {
            "output": {"uri": output_uri},
            "preprocess": sections["preprocess"] | {"mode": mode},
            "compute": sections["compute"] | {"use_gpu": use_gpu},
        }
    )
    run_on(head, label_and_embed, config)
    return output_uri


@pytest.mark.slow
def test_infer_writes_the_same_rows_as_on_cpus_in_every_mode(
    gpu_head: RayHead, ray_server: RayHead, sections: dict[str, Any], photographs: Path
) -> None:
    torn = photographs / "torn.jpg"
    torn.write_bytes(b"no image")
    try:
        on_cpus = {
            mode: infer_on(ray_server, sections, f"cpu-{mode}", mode, use_gpu=False) for mode in ("exact", "fast")
        }
        on_gpus = {mode: infer_on(gpu_head, sections, f"gpu-{mode}", mode, use_gpu=True) for mode in MODES}
    finally:
        torn.unlink()
    for mode, output_uri in on_cpus.items():
        assert read_kind(on_gpus[mode], "part").equals(read_kind(output_uri, "part"))
    # A replica that decodes rounds differently.
    decoded_there, decoded_here = read_kind(on_gpus["cuda"], "part"), read_kind(on_cpus["fast"], "part")
    source = ["id", "uri", "width", "height"]
    assert decoded_there.select(source).equals(decoded_here.select(source))
    assert cosines(decoded_there, decoded_here).min() > 0.98
    for output_uri in (*on_cpus.values(), *on_gpus.values()):
        assert read_kind(output_uri, "failed")["uri"].to_pylist() == [str(torn)]


def test_evaluate_counts_the_same_hits_as_on_cpus(
    gpu_head: RayHead, ray_server: RayHead, sections: dict[str, Any], photographs: Path, tmp_path: Path
) -> None:
    from jobs.evaluate import evaluate

    parts = read_kind(infer_on(ray_server, sections, "labels", "exact", use_gpu=False), "part")
    labels = [row["label"][0] if row["id"] % 3 else row["label"][4] for row in parts.to_pylist()]
    lines = [f'{row["uri"]},"{label}"' for row, label in zip(parts.to_pylist(), labels)]
    (tmp_path / "list.csv").write_text("\n".join(["uri,label", *lines]))
    shared = {name: sections[name] for name in ("model", "preprocess", "compute")}
    summaries = [
        run_on(
            head,
            evaluate,
            EvaluateConfig.model_validate(
                shared
                | {"input": {"uri": str(tmp_path / "list.csv")}, "compute": shared["compute"] | {"use_gpu": use_gpu}}
            ),
        )
        for head, use_gpu in ((ray_server, False), (gpu_head, True))
    ]
    on_cpus, on_gpus = ({name: summary[name] for name in ("top1", "top5", "num_images")} for summary in summaries)
    assert on_gpus == on_cpus
    assert 0.3 < on_gpus["top1"] < on_gpus["top5"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "cuda"])
def test_benchmark_measures_replicas_on_gpus(gpu_head: RayHead, sections: dict[str, Any], mode: str) -> None:
    from jobs.benchmark import benchmark

    config = BenchmarkConfig.model_validate(
        {name: section for name, section in sections.items() if name != "failure"}
        | {"preprocess": {"image_size": 64, "mode": mode}, "compute": {"use_gpu": True, "batch_size": BATCH_SIZE}}
        | {"sample": {"stage_s": 0.5}}
    )
    summary = run_on(gpu_head, benchmark, config)
    assert summary["num_failed"] == 0
    assert summary["plan"]["num_gpus_per_worker"] == 1
    assert summary["plan"]["num_workers"] == NUM_GPUS


def test_gpu_that_torch_cannot_use_is_reported_in_one_line(gpu_head: RayHead, sections: dict[str, Any]) -> None:
    from jobs.infer import label_and_embed

    config = InferConfig.model_validate(sections | {"compute": {"use_gpu": True}})
    with pytest.raises(RunError, match=r"a GPU to this replica .* that torch .* cannot use: check the driver"):
        run_on(gpu_head, label_and_embed, config, device=None)


def test_replicas_without_gpus_ignore_the_test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEST_DEVICE_VARIABLE, "meta")
    assert replica_accelerator(use_gpu=False).device.type == "cpu"
    assert replica_accelerator(use_gpu=True).device.type == "meta"
