"""Starting point of a run: initial weights, and classes and their order."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils import CheckpointSaver

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.models.catalogue import MODEL_CARDS
from pipelines.training.start import build_module, build_trainable_on_meta, resolve_start

SMALL = "ecaresnet26t"
# Substrings of the names of small models.
SMALL_PARTS = ("test_", "nano", "atto", "tiny", "pico", "femto", "xxs", "small", "_s", "_xs", "_0", "18", "mini")


def config(**model: Any) -> TrainConfig:
    sections = {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}, "preprocess": {"image_size": 64}}
    return TrainConfig.model_validate(sections | {"model": {"name": SMALL, **model}})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm directory of three classes that are not in alphabetical order."""
    folder = tmp_path_factory.mktemp("three")
    torch.manual_seed(5)
    safetensors.torch.save_file(timm.create_model(SMALL, num_classes=3).state_dict(), folder / "model.safetensors")
    names = ["dog", "ant", "cat"]
    (folder / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 3, "label_names": names}))
    return folder


def test_same_classes_keep_the_order_and_classifier_of_the_checkpoint(directory: Path) -> None:
    start = resolve_start(config(weights=str(directory)), ["ant", "cat", "dog"])
    assert start.class_names == ("dog", "ant", "cat")
    saved = safetensors.torch.load_file(directory / "model.safetensors")
    module = build_module(config(weights=str(directory)), start)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())


def test_other_classes_keep_only_the_backbone(directory: Path) -> None:
    start = resolve_start(config(weights=str(directory)), ["ant", "bee", "cat", "dog"])
    module = build_module(config(weights=str(directory)), start)
    saved = safetensors.torch.load_file(directory / "model.safetensors")
    differ = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, saved[name])}
    assert differ == {"fc.weight", "fc.bias"}
    assert start.class_names == ("ant", "bee", "cat", "dog")
    assert start.transform.input_size == (64, 64)


@pytest.fixture
def timm_checkpoint(tmp_path: Path) -> Path:
    """Checkpoint as timm's train.py writes it: three classes without names."""
    module = timm.create_model(SMALL, num_classes=3)
    saver = CheckpointSaver(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        args=argparse.Namespace(model=SMALL),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=1.0)
    return tmp_path / "model_best.pth.tar"


def test_timm_checkpoint_keeps_its_classifier_in_timms_order_of_folders(
    timm_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    names = ["B10", "b9", "a"]
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").touch()
    timms = ReaderImageFolder(str(tmp_path / "images")).class_to_idx
    start = resolve_start(config(weights=str(timm_checkpoint)), sorted(names))
    assert {name: index for index, name in enumerate(start.class_names)} == timms
    saved = torch.load(timm_checkpoint, weights_only=False)["state_dict"]
    assert torch.equal(start.state_dict["fc.weight"], saved["fc.weight"])
    assert "0 = a, 1 = b9, 2 = B10" in caplog.text


def test_other_number_of_classes_drops_the_classifier(timm_checkpoint: Path) -> None:
    start = resolve_start(config(weights=str(timm_checkpoint)), ["a", "b"])
    assert start.class_names == ("a", "b")
    assert "fc.weight" not in start.state_dict


def test_random_weights_depend_only_on_the_seed() -> None:
    start = resolve_start(config(weights="random"), ["a", "b"])
    first, second = (build_module(config(weights="random"), start).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", MODEL_CARDS)
def test_every_documented_model_starts_from_random_weights(name: str) -> None:
    start = resolve_start(config(name=name, weights="random"), ["a", "b", "c"])
    assert build_module(config(name=name, weights="random"), start).num_classes == 3


def test_unknown_models_and_missing_weights_are_rejected() -> None:
    with pytest.raises(RequestError, match="knows no model"):
        resolve_start(config(name="ecaresnot", weights="random"), ["a"])
    with pytest.raises(RequestError, match="does not exist"):
        resolve_start(config(weights="/absent.safetensors"), ["a"])


def test_dropout_is_passed_to_the_model_only_if_set() -> None:
    configs = {name: config(weights="random", **keys) for name, keys in DROPOUT.items()}
    start = resolve_start(configs["unset"], ["a", "b"])
    rates = {name: build_module(one, start).drop_rate for name, one in configs.items()}
    assert rates == {"unset": 0.0, "head": 0.25, "paths": 0.0}
    num_paths = {name: count_drop_paths(build_module(one, start)) for name, one in configs.items()}
    assert num_paths["unset"] == num_paths["head"] == 0 < num_paths["paths"]


DROPOUT: dict[str, dict[str, float]] = {"unset": {}, "head": {"drop_rate": 0.25}, "paths": {"drop_path_rate": 0.1}}


def count_drop_paths(module: Any) -> int:
    return sum(type(child).__name__ == "DropPath" for child in module.modules())


def test_default_stochastic_depth_of_a_model_is_kept_if_unset() -> None:
    name = "swin_tiny_patch4_window7_224"  # 0.1 in timm
    default = TrainConfig.model_validate(
        {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}, "model": {"name": name, "weights": "random"}}
    )
    assert count_drop_paths(build_trainable_on_meta(default, name, 2)) > 0
    off = default.model_copy(update={"model": default.model.model_copy(update={"drop_path_rate": 0.0})})
    assert count_drop_paths(build_trainable_on_meta(off, name, 2)) == 0


@pytest.mark.parametrize("weights", ["random", "FILE"])
def test_unsupported_stochastic_depth_is_rejected(weights: str, tmp_path: Path) -> None:
    name = "vgg11"
    if weights == "FILE":
        name = "densenet121"
        weights = str(tmp_path / "some.safetensors")
        safetensors.torch.save_file(timm.create_model(name, num_classes=2).state_dict(), weights)
    assert resolve_start(config(name=name, weights=weights, drop_rate=0.1), ["a", "b"])
    with pytest.raises(RequestError, match=f"{name} does not support model.drop_path_rate: leave it out"):
        resolve_start(config(name=name, weights=weights, drop_rate=0.1, drop_path_rate=0.1), ["a", "b"])


def small_architecture(family: str) -> str:
    return min(timm.list_models(module=family), key=lambda name: (not any(map(name.count, SMALL_PARTS)), len(name)))


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_timm_family_starts(family: str) -> None:
    name = small_architecture(family)
    request = TrainConfig.model_validate(
        {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}, "model": {"name": name, "weights": "random"}}
    )
    assert resolve_start(request, ["a", "b", "c"]).class_names == ("a", "b", "c")
    assert build_trainable_on_meta(request, name, 3).num_classes == 3


@pytest.mark.parametrize("name", [SMALL, pytest.param("repvit_m0_9", marks=pytest.mark.slow)])
def test_backbone_without_classifier_gets_a_new_one(name: str, tmp_path: Path) -> None:
    backbone = timm.create_model(name, num_classes=0).state_dict()
    backbone = {key: value for key, value in backbone.items() if not key.endswith("num_batches_tracked")}
    torch.save(backbone, tmp_path / "backbone.pth")
    request = config(name=name, weights=str(tmp_path / "backbone.pth"))
    start = resolve_start(request, ["ant", "bee"])
    module = build_module(request, start)
    assert start.class_names == ("ant", "bee")
    assert module.num_classes == 2
    found = module.state_dict()
    assert all(torch.equal(found[key], value) for key, value in backbone.items())
