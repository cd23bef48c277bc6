"""The job `evaluate` on real Ray, compared with the accuracy computed from the output of `infer`."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import timm
import torch

from cluster.local.ray_head import RayHead
from pipelines.config.evaluate import EvaluateConfig
from pipelines.downstream.evaluation import HitCounter, match_targets
from pipelines.errors import RequestError, RunError
from pipelines.inputs.files import FilesReader
from pipelines.inputs.labelled import LabelledImages
from tests.support.infer import infer, read_kind
from tests.support.schemas import schema_of_predictions

SMALL = {"name": "ecaresnet26t"}
PREPROCESS = {"image_size": 64}
NUM_CLASSES = 7


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights with a scaled-up classifier, so that different images get different classes."""
    torch.manual_seed(0)
    state = timm.create_model(SMALL["name"], num_classes=NUM_CLASSES).state_dict()
    state["fc.weight"] *= 1000
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    safetensors.torch.save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """Class folders. The class of a photograph depends on its position only, so that some predictions are right."""
    root = tmp_path_factory.mktemp("labelled")
    for index, path in enumerate(sorted(photographs.iterdir())[:21]):
        folder = root / str(index % NUM_CLASSES)
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    (root / "3" / "torn.jpg").write_bytes(b"no image")
    return root


def evaluate(ray_server: RayHead, **sections: Any) -> dict[str, Any]:
    from jobs.evaluate import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_server.address)
        patch.setenv("HOME", str(ray_server.home))
        return evaluate(EvaluateConfig.model_validate(sections))


def test_accuracy_equals_that_of_the_output_of_infer(
    ray_server: RayHead, labelled: Path, weights: str, tmp_path: Path
) -> None:
    sections = {"model": SMALL | {"weights": weights}, "preprocess": PREPROCESS}
    measured = evaluate(ray_server, input={"uri": str(labelled)}, **sections)
    infer(ray_server, input={"uri": str(labelled)}, output={"uri": str(tmp_path / "out")}, **sections)
    rows = read_kind(str(tmp_path / "out"), "part").to_pylist()
    hits = [[label == Path(row["uri"]).parent.name for label in row["label"]] for row in rows]
    assert measured["num_images"] == len(rows) == 21
    assert measured["top1"] == np.mean([row[0] for row in hits])
    assert measured["top5"] == np.mean([any(row) for row in hits])
    assert 0 < measured["top1"] < measured["top5"] < 1
    assert measured["num_failed"] == 1
    assert "torn.jpg: not_an_image" in measured["failed"][0]


def test_run_without_a_readable_image_fails(ray_server: RayHead, weights: str, tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "torn.jpg").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"all 1 images failed, the first is .*torn\.jpg"):
        evaluate(ray_server, input={"uri": str(tmp_path)}, model=SMALL | {"weights": weights}, preprocess=PREPROCESS)


def test_failed_rows_are_named_and_not_counted() -> None:
    rows = {
        "id": [2, 0, 1],
        "uri": ["/c", "/a", "/b"],
        "index": [[4, 0], None, [1, 3]],
        "error_kind": [None, "empty", None],
        "error_message": [None, "no bytes", None],
        "num_retries": [0, 0, 0],
    }
    schema = schema_of_predictions(2, 0)
    table = pa.table({name: pa.array(rows.get(name, [None] * 3), schema.field(name).type) for name in schema.names})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.get", lambda reference: reference)
        counter: Any = HitCounter
        (row,) = counter(np.array([9, 3, 4]))(table).to_pylist()
    assert row == {"num_images": 2, "num_top1": 1, "num_top5": 2, "failed": ["/a: empty: no bytes"]}


def images_of(*labels: str) -> LabelledImages:
    return LabelledImages(pa.table({"uri": [f"/{label}" for label in labels], "label": labels}), 0, FilesReader())


def test_classes_are_matched_by_name_or_by_wordnet_id() -> None:
    class Facts:
        label_names = ("tench, Tinca tinca", "goldfish, Carassius auratus")
        class_ids = ("n01440764", "n01443537")

    facts: Any = Facts()
    assert match_targets(images_of("n01443537", "n01440764"), facts).tolist() == [1, 0]
    assert match_targets(images_of("goldfish, Carassius auratus"), facts).tolist() == [1]
    with pytest.raises(RequestError, match="'gold fish'"):
        match_targets(images_of("gold fish"), facts)


def test_classes_of_a_model_without_names_follow_timms_folder_order() -> None:
    class Facts:
        label_names = class_ids = ("0", "1", "2")

    facts: Any = Facts()
    assert match_targets(images_of("b10", "a", "b9"), facts).tolist() == [2, 0, 1]
    assert match_targets(images_of("2", "0"), facts).tolist() == [2, 0]
    with pytest.raises(RequestError, match="not among the model's 3"):
        match_targets(images_of("b", "a"), facts)
