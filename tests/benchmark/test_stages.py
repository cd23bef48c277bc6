"""Costs of the separate stages, and the ceilings derived from them."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.benchmark.report import GPU_DECODE, find_bounds, format_report
from pipelines.benchmark.setup import num_stage_images, num_whole_images
from pipelines.benchmark.stages import (
    StageCost,
    measure_decode,
    measure_device_decode,
    measure_fetch,
    measure_forward,
    measure_write,
)
from pipelines.benchmark.whole import steady_rate
from pipelines.config.benchmark import BenchmarkConfig
from pipelines.config.sections import ComputeConfig, ModelConfig, PreprocessConfig
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.options import PredictOptions
from pipelines.engine.plan import plan_compute
from pipelines.errors import RunError
from pipelines.images.transform import EvalTransform
from pipelines.models.bundle import ModelBundle
from pipelines.models.resolve import prepare_bundle, resolve_bundle
from pipelines.outputs.writer import PartWriter
from pipelines.runtime.nodes import Node
from tests.support.schemas import columns_of, schema_of_parts

STAGE_S = 0.2
COSTS = {
    "fetch": StageCost(500, 0.001, 100_000),
    "decode": StageCost(250, 0.004),
    "forward": StageCost(40, 0.04),
    "write": StageCost(200, 0.005),
}
CPU_PLAN = plan_compute(ComputeConfig(), [Node(8, 0)])
GPU_PLAN = plan_compute(ComputeConfig(use_gpu=True), [Node(8, 2)])
IMAGENET = EvalTransform((224, 224), 0.875, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def bundle(telling_weights: Callable[[str], Path]) -> ModelBundle:
    weights = str(telling_weights("test_resnet"))
    return prepare_bundle(resolve_bundle(ModelConfig(name="test_resnet", weights=weights), PreprocessConfig()))


def rows_of(paths: list[Path]) -> pa.Table:
    return pa.table({"uri": [str(path) for path in paths]})


def test_fetch_cost_includes_bytes_per_image(photographs: Path) -> None:
    paths = sorted(photographs.iterdir())
    cost = measure_fetch(rows_of(paths), FetchAndDecode(IMAGENET, 10**8, 10**8, "fast"), 0.001)
    assert cost.bytes_per_image == pytest.approx(sum(path.stat().st_size for path in paths[:64]) / 64)
    assert cost.images_per_s > 0


def test_decode_cost_ignores_files_that_are_not_images(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image")
    decode = FetchAndDecode(IMAGENET, 10**8, 10**8, "fast")
    rows = rows_of([tmp_path / "text", *sorted(photographs.iterdir())[:3]])
    cost = measure_decode(rows, decode, STAGE_S)
    # Decoding uses one thread, so its CPU time cannot exceed its wall time.
    assert 0 < cost.cpu_s_per_image < 1.2 / cost.images_per_s
    with pytest.raises(RunError, match="not one of the sampled images"):
        measure_decode(rows.slice(0, 1), decode, STAGE_S)


def test_device_decode_cost_ignores_files_that_it_cannot_decode(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image")
    decode, options = (
        FetchAndDecode(IMAGENET, 10**8, 10**8, "cuda"),
        PredictOptions(8, columns_of(5, True), use_gpu=False),
    )
    jpegs = sorted(path for path in photographs.iterdir() if path.suffix == ".jpg")
    rows = rows_of([tmp_path / "text", *jpegs[:3]])
    cost = measure_device_decode(rows, decode, options, STAGE_S)
    assert cost is not None
    assert cost.images_per_s > 0
    assert measure_device_decode(rows.slice(0, 1), decode, options, STAGE_S) is None


def test_forward_cost_is_positive(bundle: ModelBundle) -> None:
    cost = measure_forward(bundle, PredictOptions(8, columns_of(5, True), use_gpu=False), 2, STAGE_S)
    assert cost.cpu_s_per_image > 0
    assert cost.images_per_s > 0


@pytest.mark.parametrize(("topk", "embedding"), [(5, True), (0, True), (5, False)])
def test_write_cost_uses_files_of_the_runs_schema(
    bundle: ModelBundle, tmp_path: Path, topk: int, embedding: bool
) -> None:
    writer = PartWriter(str(tmp_path), schema_of_parts(topk, bundle.num_features if embedding else 0), {})
    assert measure_write(writer, 20, STAGE_S).images_per_s > 0
    (file,) = tmp_path.iterdir()
    table = pq.read_table(file)
    assert table.num_rows == 20
    assert table.schema.equals(writer.parts_schema)


def test_cores_bound_all_stages_together() -> None:
    bounds = find_bounds(COSTS, replace(CPU_PLAN, num_workers=5), 8, num_readers=8)
    assert [bound.by for bound in bounds] == ["cores", "replicas", "store"]
    assert [bound.images_per_s for bound in bounds] == pytest.approx([8 / 0.05, 200, 4000])
    assert bounds[0].stage == "forward"


def test_replicas_on_gpus_have_a_separate_bound() -> None:
    bounds = find_bounds(COSTS, GPU_PLAN, 8, num_readers=8)
    assert [(bound.by, bound.images_per_s) for bound in bounds] == [
        ("replicas", 80),
        ("cores", pytest.approx(160)),
        ("store", 4000),
    ]
    bounds = find_bounds(COSTS | {GPU_DECODE: StageCost(250, 0)}, GPU_PLAN, 8, num_readers=8)
    assert ("GPU decoders", 500) in [(bound.by, bound.images_per_s) for bound in bounds]


def test_report_shows_every_figure() -> None:
    summary: dict[str, Any] = {
        "stages": {name: asdict(cost) for name, cost in COSTS.items()},
        "ceilings": [asdict(bound) for bound in find_bounds(COSTS, CPU_PLAN, 8, num_readers=8)],
        "steady_images_per_s": 144.0,
        "share_of_ceiling": 0.9,
        "images_per_s": 100.0,
        "binds": "forward, by the cores",
        "start_s": {"list": 0.5, "first file": 3.0},
    }
    text = format_report(summary)
    for row in (
        ["fetch", "500.0", "50.0", "1.00", "2%"],
        ["forward", "40.0", "40.00", "80%"],
        ["cores", "160.0"],
        ["steady", "144.0", "90%", "of", "the", "lowest", "ceiling"],
        ["first", "file", "3.0"],
    ):
        assert row in [line.split() for line in text.splitlines()], row
    assert "too few files" in format_report(summary | {"steady_images_per_s": None, "share_of_ceiling": None})


def test_steady_rate_excludes_start_and_end() -> None:
    # The first 100 images take 10 s, then come 100 per second, and the last file is late.
    times = [(0, 0.0), *((100 * number, 9.0 + number) for number in range(1, 10)), (1000, 30.0)]
    assert steady_rate(times) == pytest.approx(100)
    assert steady_rate([(0, 0.0), (512, 20.0), (1000, 20.0001)]) is None
    assert steady_rate([(0, 0.0), (50, 10.0)]) is None


def test_whole_run_takes_a_minute_unless_num_images_is_set() -> None:
    keys = {"input": {"uri": "s3://b/images"}, "output": {"uri": "s3://b/bench"}}
    config = BenchmarkConfig.model_validate(keys)
    assert [num_whole_images(config, rate) for rate in (2.0, 50.0, 10_000.0)] == [1_000, 3_000, 600_000]
    assert num_stage_images(config) == 20_000
    asked = BenchmarkConfig.model_validate(keys | {"sample": {"num_images": 7}})
    assert num_whole_images(asked, 50.0) == num_stage_images(asked) == 7
