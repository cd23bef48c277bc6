"""Export of checkpoints to timm directories."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pipelines.config.export import ExportConfig
from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform
from pipelines.training.checkpoint import describe_model, save_state, save_timm_directory
from pipelines.training.export import run

SMALL = "ecaresnet26t"
NAMES = ("ant", "bee", "cat")
TRANSFORM = EvalTransform((64, 64), 0.9, "center", "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def export(checkpoint: Path, output: Path) -> dict[str, Any]:
    return run(ExportConfig.model_validate({"checkpoint": {"uri": str(checkpoint)}, "output": {"uri": str(output)}}))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    return timm.create_model(SMALL, num_classes=3).eval()


def state(model: Any, ema: Any) -> dict[str, Any]:
    learner = {"state_dict": model.state_dict(), "state_dict_ema": None if ema is None else ema.state_dict()}
    return {"model": describe_model(SMALL, NAMES, TRANSFORM), "learner": learner}


def assert_timm_loads(folder: Path, model: Any) -> None:
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert list(loaded.pretrained_cfg["input_size"]) == [3, 64, 64]
    described = json.loads((folder / "config.json").read_text())
    assert described["label_names"] == list(NAMES)
    assert "tag" not in described["pretrained_cfg"]


def test_ema_is_exported_from_a_state_without_a_choice(model: Any, tmp_path: Path) -> None:
    save_state(tmp_path, state(model, None))
    summary = export(tmp_path, tmp_path / "out")
    assert (summary["model"], summary["num_classes"]) == (SMALL, 3)
    assert_timm_loads(tmp_path / "out", model)
    ema = timm.create_model(SMALL, num_classes=3).eval()
    save_state(tmp_path, state(model, ema))
    export(tmp_path, tmp_path / "ema")
    assert_timm_loads(tmp_path / "ema", ema)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"handed_out": "model"}, "model"),
        ({"handed_out": "average"}, "average"),
        ({"history": [{"of": "average"}, {"of": "model"}]}, "model"),  # older checkpoints only hold the choice here
        ({"history": [], "handed_out": "model"}, "model"),
    ],
)
def test_export_follows_the_choice_of_the_run(
    choice: dict[str, Any], expected: str, model: Any, tmp_path: Path
) -> None:
    ema = timm.create_model(SMALL, num_classes=3).eval()
    save_state(tmp_path, state(model, ema) | choice)
    export(tmp_path, tmp_path / "out")
    assert_timm_loads(tmp_path / "out", model if expected == "model" else ema)


def test_best_checkpoint_and_finished_run_export_the_same_files(model: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    save_timm_directory(checkpoint, model, NAMES, TRANSFORM)
    record = {"identity": {}, "summary": {"checkpoint_uri": str(checkpoint)}}
    (tmp_path / "run" / "_run.json").write_text(json.dumps(record))
    export(checkpoint, tmp_path / "one")
    export(tmp_path / "run", tmp_path / "two")
    assert_timm_loads(tmp_path / "one", model)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_invalid_checkpoints_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no checkpoint at"):
        export(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(RequestError, match="not a checkpoint that can be loaded safely"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(RequestError, match=r"is not empty: found state\.pt"):
        export(tmp_path, tmp_path)
    (tmp_path / "_run.json").write_text(json.dumps({"identity": {}}))
    with pytest.raises(RequestError, match="has not finished"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_into_the_data_of_the_run_is_rejected(model: Any, tmp_path: Path) -> None:
    data, checkpoint = tmp_path / "data", tmp_path / "run" / "checkpoint_1"
    for folder in (data, checkpoint):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    save_timm_directory(checkpoint, model, NAMES, TRANSFORM)
    record = {"config": {"data": {"train": {"uri": str(data)}, "validation": None}}}
    (tmp_path / "run" / "_run.json").write_text(json.dumps(record))
    for output in (data / "exported", tmp_path / "link" / "exported"):
        with pytest.raises(RequestError, match=r"lies inside data\.train\.uri"):
            export(checkpoint, output)
    assert not list(data.iterdir())
    assert export(checkpoint, tmp_path / "exported")["num_classes"] == 3
