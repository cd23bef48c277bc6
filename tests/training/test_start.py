import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.models.catalogue import MODEL_CARDS
from pipelines.training.start import build_module, resolve_start

SMALL = "ecaresnet26t"


def config(**model: Any) -> TrainConfig:
    sections = {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}, "preprocess": {"image_size": 64}}
    return TrainConfig.model_validate(sections | {"model": {"name": SMALL, **model}})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm directory of three classes, whose order is not that of their names."""
    folder = tmp_path_factory.mktemp("three")
    torch.manual_seed(5)
    safetensors.torch.save_file(timm.create_model(SMALL, num_classes=3).state_dict(), folder / "model.safetensors")
    names = ["dog", "ant", "cat"]
    (folder / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 3, "label_names": names}))
    return folder


def test_the_same_classes_keep_the_checkpoints_order_and_classifier(directory: Path) -> None:
    start = resolve_start(config(weights=str(directory)), ["ant", "cat", "dog"])
    assert start.class_names == ("dog", "ant", "cat")
    saved = safetensors.torch.load_file(directory / "model.safetensors")
    module = build_module(config(weights=str(directory)), start)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())


def test_other_classes_keep_the_backbone(directory: Path) -> None:
    start = resolve_start(config(weights=str(directory)), ["ant", "bee", "cat", "dog"])
    module = build_module(config(weights=str(directory)), start)
    saved = safetensors.torch.load_file(directory / "model.safetensors")
    differ = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, saved[name])}
    assert differ == {"fc.weight", "fc.bias"}
    assert start.class_names == ("ant", "bee", "cat", "dog")
    assert start.transform.input_size == (64, 64)


def test_random_weights_are_those_of_the_seed() -> None:
    start = resolve_start(config(weights="random"), ["a", "b"])
    first, second = (build_module(config(weights="random"), start).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", MODEL_CARDS)
def test_each_of_the_five_starts_at_random(name: str) -> None:
    start = resolve_start(config(name=name, weights="random"), ["a", "b", "c"])
    assert build_module(config(name=name, weights="random"), start).num_classes == 3


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(RequestError, match="knows no model"):
        resolve_start(config(name="ecaresnot", weights="random"), ["a"])
    with pytest.raises(RequestError, match="does not exist"):
        resolve_start(config(weights="/absent.safetensors"), ["a"])
