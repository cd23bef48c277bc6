"""Resolution of a request, and the identity that two runs with the same output have to share."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.training.request import CHECKPOINTS_FILE, find_summary, normalize, resolve_request


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def config(folder: Path, **sections: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "data": {"train": {"uri": str(folder)}},
        "output": {"uri": str(folder.parent / "out")},
        "model": {"name": "test_resnet", "weights": "random"},
        "preprocess": {"image_size": 32},
    }
    base["optim"] = {"global_batch_size": 4, **sections.pop("optim", {})}
    base["model"] |= sections.pop("model", {})
    return normalize(TrainConfig.model_validate(base | sections))


def begin(request: TrainConfig) -> None:
    """Claim the output, as a run does before its first step."""
    resolve_request(request).pin()


def write_checkpoint_list(data: Path) -> None:
    """Write the file that Ray Train writes with its first checkpoint."""
    (data.parent / "out" / CHECKPOINTS_FILE).write_text("{}")


FREE: list[dict[str, Any]] = [
    {"optim": {"grad_accum_steps": 2}},
    {"model": {"compile": True}},
    {"scaling": {"num_workers": 2}},
    {"logging": {"every_s": 1}},
    {"checkpoint": {"every_steps": 5}},
    {"failure": {"max_fraction": 1}},
    {"optim": {"lr": 0.1 * 4 / 256}},  # the default, set explicitly
]


@pytest.mark.parametrize("sections", FREE)
def test_execution_keys_may_change_between_runs(data: Path, sections: dict[str, Any]) -> None:
    begin(config(data))
    write_checkpoint_list(data)
    assert find_summary(config(data, **sections)) is None


OTHER_RECIPES: list[tuple[dict[str, Any], str]] = [
    ({"optim": {"lr": 0.1}}, "optim.lr was 0.0015625, is 0.1"),
    ({"optim": {"epochs": 5}}, "optim.epochs"),
    ({"optim": {"ema_decay": 0.9}}, "optim.ema_decay"),
    ({"optim": {"ema_warmup": False}}, "optim.ema_warmup"),
    ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    ({"data": {"train": {"uri": "/other"}}}, "data.train.uri"),
    ({"preprocess": {"image_size": 32, "max_pixels": 100}}, "preprocess.max_pixels"),
]


@pytest.mark.parametrize(("sections", "message"), OTHER_RECIPES)
def test_other_recipe_is_rejected_once_there_is_a_checkpoint(
    data: Path, sections: dict[str, Any], message: str
) -> None:
    begin(config(data))
    assert find_summary(config(data, **sections)) is None  # no progress yet
    write_checkpoint_list(data)
    with pytest.raises(RequestError, match=message):
        find_summary(config(data, **sections))


def test_changed_byte_limit_is_rejected(data: Path) -> None:
    begin(config(data))
    write_checkpoint_list(data)
    with pytest.raises(RequestError, match=r"data\.max_bytes was 268435456, is 10"):
        find_summary(config(data, data={"train": {"uri": str(data)}, "max_bytes": 10}))


def test_finished_run_returns_its_summary_and_rejects_other_recipes(data: Path) -> None:
    begin(config(data))
    path = data.parent / "out" / "_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"summary": {"epochs": 1}}))
    assert find_summary(config(data)) == {"epochs": 1}
    with pytest.raises(RequestError, match="holds the output of another run"):
        find_summary(config(data, optim={"lr": 0.1}))


def test_images_are_listed_again_until_there_is_a_checkpoint(data: Path) -> None:
    begin(config(data))
    (data / "ant" / "4.png").write_bytes((data / "ant" / "0.png").read_bytes())
    assert resolve_request(config(data)).plan.num_train == 9
    write_checkpoint_list(data)
    assert resolve_request(config(data)).plan.num_train == 8  # as pinned


def test_resume_with_other_label_names_is_rejected(data: Path, tmp_path: Path) -> None:
    import safetensors.torch
    import timm

    weights = tmp_path / "weights"
    weights.mkdir()
    safetensors.torch.save_file(
        timm.create_model("test_resnet", num_classes=2).state_dict(), weights / "model.safetensors"
    )

    def name_classes(*names: str) -> None:
        described = {"architecture": "test_resnet", "num_classes": 2, "label_names": names}
        (weights / "config.json").write_text(json.dumps(described))

    request = config(data, model={"weights": str(weights)})
    name_classes("bee", "ant")
    begin(request)
    write_checkpoint_list(data)
    assert resolve_request(request).start.class_names == ("bee", "ant")
    name_classes("ant", "bee")
    with pytest.raises(RequestError, match=r"label_names was \['bee', 'ant'\], is \['ant', 'bee'\]"):
        resolve_request(request)
