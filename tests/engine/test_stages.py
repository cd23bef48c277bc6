"""Stages of the pipeline without Ray."""

import copy
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.options import PredictOptions
from pipelines.engine.predict import Predictor
from pipelines.engine.schema import IMAGES
from pipelines.images.preprocess import Mode
from pipelines.models.accelerators.cuda import CudaAccelerator
from pipelines.models.bundle import ModelBundle
from pipelines.models.resolve import prepare_bundle, resolve_bundle
from pipelines.outputs import run_record
from pipelines.outputs.writer import PartWriter
from pipelines.runtime.progress import Progress
from tests.support.embeddings import cosines
from tests.support.schemas import columns_of, schema_of_parts

BATCH_SIZE = 8
OPTIONS = PredictOptions(BATCH_SIZE, columns_of(5, True), use_gpu=False)


@pytest.fixture(scope="module")
def config(telling_weights: "object") -> ModelConfig:
    assert callable(telling_weights)
    name = "ecaresnet50d_pruned"
    return ModelConfig(name=name, weights=str(telling_weights(name)))


@pytest.fixture(scope="module")
def bundle(config: ModelConfig) -> ModelBundle:
    return prepare_bundle(resolve_bundle(config, PreprocessConfig()))


@pytest.fixture(scope="module")
def images(bundle: ModelBundle, photographs: Path) -> pa.Table:
    """11 good rows, and a failed row in the middle."""
    paths = [str(path) for path in sorted(photographs.iterdir())[:11]]
    paths.insert(4, "/absent.jpg")
    batch = pa.table({"id": pa.array(range(12), pa.int64()), "uri": paths})
    return FetchAndDecode(bundle.transform, 10**8, 10**8, "exact")(batch)


@pytest.fixture(scope="module")
def predictor(bundle: ModelBundle) -> Predictor:
    return Predictor(bundle, OPTIONS)


@pytest.fixture(scope="module")
def predictions(predictor: Predictor, images: pa.Table) -> pa.Table:
    return predictor(images)


def test_rows_keep_their_order_and_failed_rows_their_error(images: pa.Table, predictions: pa.Table) -> None:
    assert predictions["uri"].to_pylist() == images["uri"].to_pylist()
    assert predictions["error_kind"].to_pylist() == [None] * 4 + ["not_found"] + [None] * 7
    assert predictions["embedding"].is_null().to_pylist() == [position == 4 for position in range(12)]


def test_row_does_not_depend_on_its_batch(predictor: Predictor, images: pa.Table, predictions: pa.Table) -> None:
    order = np.random.default_rng(0).permutation(12)
    shuffled = predictor(images.take(pa.array(order)))
    alone = pa.concat_tables([predictor(images.slice(position, 1)) for position in range(12)])
    for other in (shuffled.sort_by("id"), alone):
        for name in ("index", "prob", "label", "embedding"):
            assert other[name].to_pylist() == predictions[name].to_pylist(), name


def test_concurrent_batches_give_the_same_rows(predictor: Predictor, images: pa.Table, predictions: pa.Table) -> None:
    with ThreadPoolExecutor(4) as threads:
        for other in threads.map(predictor, [images] * 8):
            assert other.equals(predictions)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_batch_size_is_halved_when_memory_runs_out(
    error: RuntimeError,
    bundle: ModelBundle,
    images: pa.Table,
    predictions: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = Predictor(bundle, OPTIONS)
    model, sizes = predictor.forward, []

    def small_memory(batch: torch.Tensor) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise error
        return model(batch)

    monkeypatch.setattr(predictor, "forward", small_memory)
    monkeypatch.setattr(
        predictor._accelerator, "is_out_of_memory", CudaAccelerator(torch.device("cuda")).is_out_of_memory
    )
    found = predictor(images)
    assert sizes == [8, 4, *[2] * 6]
    assert found["id"].equals(predictions["id"])
    assert found["index"].equals(predictions["index"])
    monkeypatch.setattr(predictor, "batch_size", 1)
    monkeypatch.setattr(predictor, "forward", lambda batch: small_memory(torch.cat([batch] * 3)))
    with pytest.raises(type(error), match=str(error)):
        predictor(images)


def test_image_with_non_finite_results_becomes_a_failed_row(
    bundle: ModelBundle, images: pa.Table, predictions: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(bundle, OPTIONS)
    model = predictor.forward

    def overflowing(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = (result.clone() for result in model(batch))
        logits[1, 7], features[2, 3] = torch.inf, torch.nan
        return logits, features

    monkeypatch.setattr(predictor, "forward", overflowing)
    found = predictor(images.slice(0, 8))  # the fifth image could not be fetched
    expected = [None, "not_finite", "not_finite", None, "not_found", None, None, None]
    assert found["error_kind"].to_pylist() == expected
    assert found["error_message"][1].as_py() == "the model's results for this image are not finite in float32"
    good = pc.is_null(found["error_kind"])
    for name in ("id", "index", "prob", "label", "embedding"):
        assert found[name].filter(good).to_pylist() == predictions[name].slice(0, 8).filter(good).to_pylist(), name


def test_probabilities_descend_and_labels_belong_to_indices(bundle: ModelBundle, predictions: pa.Table) -> None:
    for row in predictions.filter(
        pa.array([kind is None for kind in predictions["error_kind"].to_pylist()])
    ).to_pylist():
        assert row["prob"] == sorted(row["prob"], reverse=True)
        assert row["label"] == [bundle.label_names[index] for index in row["index"]]


def test_batch_of_failed_rows_passes_through(predictor: Predictor) -> None:
    row = {"id": 3, "uri": "x", "error_kind": "truncated", "error_message": "y", "num_retries": 2}
    batch = pa.Table.from_pylist([row], schema=IMAGES)
    assert predictor(batch)["error_kind"].to_pylist() == ["truncated"]


def test_grayscale_images_with_more_than_8_bits_are_counted_in_the_write_result(
    bundle: ModelBundle, predictor: Predictor, tmp_path: Path
) -> None:
    for number, mode in enumerate(["L", "I;16", "RGB", "I;16"]):
        Image.new(mode, (40, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    batch = pa.table({"id": pa.array(range(5), pa.int64()), "uri": paths})
    modes: tuple[Mode, ...] = ("exact", "fast")
    for mode in modes:
        decoded = FetchAndDecode(bundle.transform, 10**8, 10**8, mode)(batch)
        assert decoded["is_clipped"].to_pylist() == [False, True, False, True, None]
    writer = PartWriter(str(tmp_path / "out"), schema_of_parts(5, bundle.num_features), {})
    (result,) = writer(predictor(decoded)).to_pylist()
    assert (result["num_ok"], result["num_clipped"]) == (4, 2)


def test_columns_that_are_not_requested_are_omitted(bundle: ModelBundle, images: pa.Table) -> None:
    only_labels = Predictor(bundle, PredictOptions(BATCH_SIZE, columns_of(1, False), False))(images)
    only_embeddings = Predictor(bundle, PredictOptions(BATCH_SIZE, columns_of(0, True), False))(images)
    assert "embedding" not in only_labels.column_names
    assert not {"index", "prob", "label"} & set(only_embeddings.column_names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_stays_close(config: ModelConfig, images: pa.Table, predictions: pa.Table, dtype: str) -> None:
    in_dtype = resolve_bundle(config.model_copy(update={"dtype": dtype}), PreprocessConfig())
    lower = Predictor(prepare_bundle(in_dtype), OPTIONS)(images)
    assert cosines(lower, predictions).min() > 0.98


def test_good_and_failed_rows_are_written_to_separate_files(predictions: pa.Table, tmp_path: Path) -> None:
    writer = PartWriter(str(tmp_path), schema_of_parts(5, 2022), {"fingerprint": "f", "label_names": "[]"})
    write_result = writer(predictions).to_pylist()
    (written,) = write_result
    assert (written["num_ok"], written["failures"]) == (11, ["not_found: the object was listed but no longer exists"])
    digests = dict(zip(written["files"], written["digests"]))
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    again = writer(predictions).to_pylist()
    assert again == write_result
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "failed-000000000004-e000000.parquet",
        "part-000000000000-e000000.parquet",
    ]
    part = pq.read_table(tmp_path / "part-000000000000-e000000.parquet")
    assert part.schema.field("embedding").type == pa.list_(pa.float32(), 2022)
    assert part.schema.metadata[b"fingerprint"] == b"f"
    assert all(column.null_count == 0 for column in part.columns)


@pytest.mark.slow
def test_compiled_model_predicts_nearly_the_same(photographs: Path) -> None:
    small = prepare_bundle(resolve_bundle(ModelConfig(name="test_resnet", weights="random"), PreprocessConfig()))
    paths = [str(path) for path in sorted(photographs.iterdir())[: BATCH_SIZE + 3]]
    rows = FetchAndDecode(small.transform, 10**8, 10**8, "exact")(pa.table({"id": np.arange(len(paths)), "uri": paths}))
    eager = Predictor(copy.deepcopy(small), OPTIONS)(rows)
    compiled = Predictor(small, replace(OPTIONS, compile=True))(rows)
    there, here = (np.stack(result["embedding"].to_numpy()) for result in (compiled, eager))
    assert there.shape == (len(paths), small.num_features)
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-4)


def test_progress_shows_images_done_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(num_total=100, num_resumed=20) as progress:
        assert "20 of 100 images, starting" in progress.line()
        progress.add(30, 2, 1)
        assert progress.line().startswith("52 of 100 images, 2 failed, ")
        assert "left, 1 files" in progress.line()
    assert "52 of 100" in capsys.readouterr().err


def test_progress_is_published_as_json(tmp_path: Path) -> None:
    published: list[dict[str, Any]] = []
    with Progress(100, 20, published.append) as progress:
        assert progress.figures()["left_s"] is None
        progress.add(30, 2, 1)
        assert progress.figures()["left_s"] is not None
    assert published[-1].items() >= {"is_running": False, "num_inputs": 100, "num_ok": 30, "num_failed": 2}.items()
    run_record.write_progress(str(tmp_path), published[-1])
    content = json.loads((tmp_path / "_progress.json").read_text())
    assert content.items() >= published[-1].items()
    assert datetime.fromisoformat(content["updated_at"]).tzinfo is not None


def test_progress_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    run_record.write_progress(str(tmp_path / "file"), {})
    assert "_progress.json could not be written" in caplog.text


def test_parquet_files_contain_no_ray_types(predictions: pa.Table, tmp_path: Path) -> None:
    PartWriter(str(tmp_path), schema_of_parts(5, 2022), {})(predictions)
    schema = pq.read_schema(io.BytesIO((tmp_path / "part-000000000000-e000000.parquet").read_bytes()))
    assert not any(isinstance(field.type, pa.ExtensionType) for field in schema)
