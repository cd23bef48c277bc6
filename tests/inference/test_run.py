"""The job `infer` on real Ray and a real object store. The pipeline runs once, and many tests read its output."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch

from cluster.local.photographs import crops, encode
from cluster.local.ray_head import RayHead
from pipelines.errors import RequestError, RunError
from pipelines.models.catalogue import MODEL_CARDS
from pipelines.outputs import open_output
from pipelines.runtime.cpu import why_no_int8
from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, open_filesystem, read_bytes
from tests.conftest import NUM_PHOTOGRAPHS
from tests.support.broken import broken_files, strange_files
from tests.support.embeddings import cosines
from tests.support.infer import infer, read_kind
from tests.support.photographs import KINDS, SIZES, write_photographs
from tests.support.weights import load_images, save_telling_weights

MODEL = "ecaresnet50d_pruned"
INPUT = "s3://images/run"
OUTPUT = "s3://results/run"
COLUMNS = ("id", "uri", "width", "height", "index", "prob", "label", "embedding")


@pytest.fixture(scope="module")
def uploaded(photographs: Path, ray_server: RayHead) -> str:
    """The photographs and two files that are not images, in the store."""
    filesystem, path = open_filesystem(INPUT)
    filesystem.put(f"{photographs}/", f"{path}/", recursive=True)
    filesystem.pipe({f"{path}/zz-text.jpg": b"no image", f"{path}/zz-empty.jpg": b"", f"{path}/left-out.json": b"{}"})
    return INPUT


@pytest.fixture(scope="module")
def sections(telling_weights: Callable[[str], Path]) -> dict[str, Any]:
    return {"model": {"name": MODEL, "weights": str(telling_weights(MODEL))}}


@pytest.fixture(scope="module")
def summary(ray_server: RayHead, uploaded: str, sections: dict[str, Any]) -> dict[str, Any]:
    """One run from S3 to S3."""
    where = {"input": {"uri": uploaded, "exclude": ["*.json"]}, "output": {"uri": OUTPUT}}
    return infer(ray_server, **where, **sections)


@pytest.fixture(scope="module")
def rows(summary: dict[str, Any]) -> pa.Table:
    return read_kind(OUTPUT, "part")


def timms_answer(name: str, weights: Path, photographs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and embeddings computed with timm alone: its transform and its model in one process."""
    model: Any = timm.create_model(name, checkpoint_path=str(weights)).eval()
    with torch.inference_mode():
        features = model.forward_features(load_images(model, photographs))
        return model.forward_head(features).softmax(-1), model.forward_head(features, pre_logits=True)


def assert_equals_timm(rows: pa.Table, name: str, weights: Path, photographs: Path) -> None:
    prob, embedding = timms_answer(name, weights, photographs)
    assert len(prob.argmax(-1).unique()) > 0.6 * len(prob), "these weights do not tell the photographs apart"
    expected = prob.topk(5)
    paths = [uri.rpartition("/")[2] for uri in rows["uri"].to_pylist()]
    assert paths == sorted(path.name for path in photographs.iterdir())
    assert rows["index"].to_pylist() == expected.indices.tolist()
    np.testing.assert_allclose(np.array(rows["prob"].to_pylist()), expected.values.numpy(), atol=1e-5, rtol=0)
    ours = np.array(rows["embedding"].to_pylist())
    scale = np.linalg.norm(embedding.numpy(), axis=1, keepdims=True)
    assert (np.linalg.norm(ours - embedding.numpy(), axis=1, keepdims=True) / scale).max() < 1e-4
    np.testing.assert_allclose(ours, embedding.numpy(), rtol=1e-4, atol=1e-4 * float(embedding.abs().max()))


def test_rows_equal_those_of_timm_in_one_process(
    rows: pa.Table, photographs: Path, telling_weights: Callable[[str], Path]
) -> None:
    assert_equals_timm(rows, MODEL, telling_weights(MODEL), photographs)


def test_each_input_has_exactly_one_row(summary: dict[str, Any], rows: pa.Table) -> None:
    failed = read_kind(OUTPUT, "failed")
    ids = sorted(rows["id"].to_pylist() + failed["id"].to_pylist())
    assert ids == list(range(NUM_PHOTOGRAPHS + 2))
    assert dict(zip([uri[-12:] for uri in failed["uri"].to_pylist()], failed["error_kind"].to_pylist())) == {
        "zz-empty.jpg": "empty",
        "/zz-text.jpg": "not_an_image",
    }
    assert failed.schema.names == ["id", "uri", "error_kind", "error_message"]
    assert (summary["num_inputs"], summary["num_ok"], summary["num_failed"]) == (68, 66, 2)
    assert summary["num_excluded"] == 1


def test_summary_has_the_documented_keys(summary: dict[str, Any]) -> None:
    assert set(summary) >= {
        *("num_inputs", "num_ok", "num_failed", "num_excluded", "num_resumed", "num_files"),
        *("wall_time_s", "images_per_s", "output_uri"),
    }
    assert summary["output_uri"] == OUTPUT
    assert summary["num_files"] == len([name for name in list_names(OUTPUT) if name.endswith(".parquet")])


def test_rows_have_the_documented_columns_and_types(rows: pa.Table) -> None:
    assert tuple(rows.schema.names) == COLUMNS
    assert rows.schema.types == [
        *(pa.int64(), pa.string(), pa.int32(), pa.int32(), pa.list_(pa.int32()), pa.list_(pa.float32())),
        *(pa.list_(pa.string()), pa.list_(pa.float32(), 2022)),
    ]
    assert all(column.null_count == 0 for column in rows.columns)
    sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist()))
    assert sizes == [SIZES[index % len(SIZES)] for index in range(NUM_PHOTOGRAPHS)]


def test_run_record_contains_config_summary_and_fingerprint(summary: dict[str, Any]) -> None:
    assert {"_SUCCESS", "_run.json", "_manifest"} <= set(list_names(OUTPUT))
    record = json.loads(read_bytes(uris.join(OUTPUT, "_run.json")))
    assert record["summary"] == summary
    assert record["config"]["input"]["uri"] == INPUT
    assert record["transform"]["input_size"] == [224, 224]
    assert len(record["fingerprint"]) == 64


def test_polars_pandas_and_duckdb_read_plain_types(summary: dict[str, Any], tmp_path: Path, own_home: Path) -> None:
    filesystem, path = open_filesystem(OUTPUT)
    filesystem.get(path, str(tmp_path / "out"), recursive=True)
    code = f"""
import json, sys
import duckdb, pandas, polars, pyarrow.parquet as pq
files = "{tmp_path}/out/part-*.parquet"
frame = polars.read_parquet(files)
assert frame.schema["embedding"] == polars.Array(polars.Float32, 2022), frame.schema
assert frame.schema["label"] == polars.List(polars.String)
first = sorted(__import__("glob").glob(files))[0]
table = pandas.concat([pandas.read_parquet(name) for name in sorted(__import__("glob").glob(files))])
assert len(table) == {NUM_PHOTOGRAPHS} and {{len(value) for value in table["embedding"]}} == {{2022}}
lengths = duckdb.sql(f"select distinct len(embedding) from '{{files}}'").fetchall()
assert lengths == [(2022,)], lengths
metadata = pq.read_schema(first).metadata
assert len(metadata[b"fingerprint"]) == 64 and len(json.loads(metadata[b"label_names"])) == 1000
assert "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("s3", "local"),
        pytest.param("local", "s3", marks=pytest.mark.slow),
        pytest.param("local", "local", marks=pytest.mark.slow),
    ],
)
def test_local_and_s3_inputs_and_outputs_give_the_same_rows(
    source: str,
    target: str,
    ray_server: RayHead,
    rows: pa.Table,
    photographs: Path,
    sections: dict[str, Any],
    tmp_path: Path,
) -> None:
    input_uri = INPUT if source == "s3" else str(photographs)
    output_uri = f"s3://results/{tmp_path.name}" if target == "s3" else str(tmp_path / "out")
    exclude = ["zz-*", "*.json"]
    infer(ray_server, input={"uri": input_uri, "exclude": exclude}, output={"uri": output_uri}, **sections)
    other = read_kind(output_uri, "part")
    for name in ("id", "width", "height", "index", "prob", "label", "embedding"):
        assert other[name].to_pylist() == rows[name].to_pylist(), name
    assert [uri.rpartition("/")[2] for uri in other["uri"].to_pylist()] == [
        uri.rpartition("/")[2] for uri in rows["uri"].to_pylist()
    ]


def test_finished_run_is_left_unchanged_and_interrupted_run_is_completed(
    ray_server: RayHead, photographs: Path, sections: dict[str, Any], tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for path in sorted(photographs.iterdir())[:16]:
        shutil.copy(path, source)
    request = {"input": {"uri": str(source)}, "output": {"uri": str(output), "commit_rows": 4}, **sections}
    request["compute"] = {"batch_size": 8}
    first = infer(ray_server, **request)
    assert (first["num_ok"], first["num_files"], first["num_resumed"]) == (16, 4, 0)
    before = read_kind(str(output), "part")
    (source / "later.jpg").write_bytes(b"added after the listing")
    second = infer(ray_server, **request)
    assert (second["num_inputs"], second["num_resumed"], second["images_per_s"]) == (16, 16, 0.0)
    (output / "_SUCCESS").unlink()
    next(output.glob("part-000000000004-*.parquet")).unlink()
    third = infer(ray_server, **request)
    assert (third["num_resumed"], third["num_ok"], third["num_files"]) == (12, 16, 4)
    assert read_kind(str(output), "part").equals(before)
    assert (output / "_SUCCESS").exists()
    with pytest.raises(RequestError, match=r"different settings: outputs\.topk was 5, is 3"):
        infer(ray_server, **request, outputs={"topk": 3})


def test_too_many_failures_stop_a_run_and_failed_rows_can_be_retried(
    ray_server: RayHead, photographs: Path, sections: dict[str, Any], tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for path in sorted(photographs.iterdir())[:12]:
        shutil.copy(path, source / f"good-{path.name}")
    broken = [source / f"broken-{index}.jpg" for index in range(4)]
    for path in broken:
        path.write_bytes(b"no image")
    request = {"input": {"uri": str(source)}, "output": {"uri": str(output), "commit_rows": 8}, **sections}
    request["compute"] = {"batch_size": 8}
    with pytest.raises(RunError, match=r"4 of \d+ images failed.*max_fraction = 0.05: 4 x not_an_image: "):
        infer(ray_server, **request)
    assert not (output / "_SUCCESS").exists()

    tolerant = infer(ray_server, **request, failure={"max_fraction": 1.0})
    assert (tolerant["num_ok"], tolerant["num_failed"]) == (12, 4)
    assert tolerant["num_resumed"] >= 8
    assert infer(ray_server, **request)["num_failed"] == 4  # the limit does not apply to a finished output

    for path in broken:
        shutil.copy(next(source.glob("good-*")), path)
    everything = infer(ray_server, **request, failure={"retry": "all"})
    assert (everything["num_ok"], everything["num_failed"], everything["num_resumed"]) == (16, 0, 12)
    assert read_kind(str(output), "part")["id"].to_pylist() == list(range(16))
    assert not list(output.glob("failed-*"))
    assert (output / "_SUCCESS").exists()


def test_files_appear_during_the_run(summary: dict[str, Any]) -> None:
    filesystem, path = open_filesystem(OUTPUT)
    times = sorted(
        info["LastModified"] for info in filesystem.ls(path, detail=True) if info["name"].endswith(".parquet")
    )
    assert times[-1] > times[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODEL_CARDS) - {MODEL}))
def test_other_models_equal_those_of_timm(name: str, ray_server: RayHead, tmp_path: Path) -> None:
    photographs, weights = tmp_path / "photographs", tmp_path / "telling.safetensors"
    photographs.mkdir()
    write_photographs(photographs, len(KINDS))  # one of each kind, because large models are slow
    save_telling_weights(name, photographs, weights)
    model = {"name": name, "weights": str(weights)}
    infer(ray_server, input={"uri": str(photographs)}, output={"uri": str(tmp_path / "out")}, model=model)
    found = read_kind(str(tmp_path / "out"), "part")
    assert found.schema.field("embedding").type.list_size == timm.create_model(name).num_features
    assert_equals_timm(found, name, weights, photographs)


@pytest.mark.slow
@pytest.mark.skipif(why_no_int8() is not None, reason=f"no int8 on this machine: {why_no_int8()}")
def test_int8_rows_are_close_to_float32(
    ray_server: RayHead, uploaded: str, rows: pa.Table, sections: dict[str, Any], tmp_path: Path
) -> None:
    # Without training, the thousand classes are too close together for the top-1 to be meaningful.
    int8 = {"dtype": "int8", "quantization": {"min_agreement": 0}}
    request: dict[str, Any] = {
        "input": {"uri": uploaded, "exclude": ["*.json"]},
        "output": {"uri": str(tmp_path / "out")},
        "model": sections["model"] | int8,
    }
    assert infer(ray_server, **request)["num_ok"] == NUM_PHOTOGRAPHS
    found = read_kind(str(tmp_path / "out"), "part")
    assert np.median(cosines(found, rows)) > 0.95
    assert infer(ray_server, **request)["num_resumed"] == NUM_PHOTOGRAPHS + 2
    request["model"] = sections["model"]
    with pytest.raises(RequestError, match="fingerprint was"):
        infer(ray_server, **request)


@pytest.mark.slow
def test_fast_mode_rows_are_close_to_exact_mode(
    ray_server: RayHead, uploaded: str, rows: pa.Table, sections: dict[str, Any], tmp_path: Path
) -> None:
    where = {"input": {"uri": uploaded, "exclude": ["*.json"]}, "output": {"uri": str(tmp_path / "out")}}
    infer(ray_server, **where, **sections, preprocess={"mode": "fast"})
    found = read_kind(str(tmp_path / "out"), "part")
    assert found["width"].to_pylist() == rows["width"].to_pylist()
    assert np.median(cosines(found, rows)) > 0.999


@pytest.mark.slow
def test_another_timm_classifier_works(ray_server: RayHead, photographs: Path, tmp_path: Path) -> None:
    model = {"name": "mobilenetv3_small_050", "weights": "random"}
    infer(ray_server, input={"uri": str(photographs)}, output={"uri": str(tmp_path / "out")}, model=model)
    table = open_output(str(tmp_path / "out")).table()
    assert table.num_rows == NUM_PHOTOGRAPHS
    assert table.schema.field("embedding").type.list_size == 1024


@pytest.mark.slow
def test_broken_files_do_not_change_good_rows(
    ray_server: RayHead, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good").mkdir()
    for name, image in crops(500, size=(160, 120)):
        (tmp_path / "good" / f"{name}.jpg").write_bytes(encode(image))
    for name, content in strange_files().items():
        (tmp_path / "good" / name).write_bytes(content)
    shutil.copytree(tmp_path / "good", tmp_path / "mixed")
    for name, (content, _) in broken_files().items():
        (tmp_path / "mixed" / name).write_bytes(content)
    model: dict[str, Any] = {"model": {"name": "ecaresnet26t", "weights": "random"}, "preprocess": {"image_size": 64}}
    model |= {"failure": {"max_fraction": 1.0}}
    for name in ("good", "mixed"):
        where = {"input": {"uri": str(tmp_path / name)}, "output": {"uri": str(tmp_path / f"{name}-out")}}
        summary = infer(ray_server, **where, **model)
        assert summary["num_clipped"] == 1  # sixteen.png
    assert caplog.text.count("1 images are grayscale with more than 8 bits") == 2
    good, mixed = read_kind(str(tmp_path / "good-out"), "part"), read_kind(str(tmp_path / "mixed-out"), "part")
    failed = read_kind(str(tmp_path / "mixed-out"), "failed")
    reasons = {Path(row["uri"]).name: row["error_kind"] for row in failed.to_pylist()}
    assert reasons.keys() == broken_files().keys()
    assert all(reasons[name] in (kinds | {"empty"}) for name, (_, kinds) in broken_files().items())
    assert sorted(mixed["id"].to_pylist() + failed["id"].to_pylist()) == list(range(len(mixed) + len(failed)))
    for column in ("width", "height", "index", "prob", "label", "embedding"):
        assert mixed[column].equals(good[column]), column
