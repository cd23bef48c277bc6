"""Catalogue, weights in all their forms, label names, transforms and fingerprints."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from cluster.local.object_store import ObjectStore
from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.errors import RequestError
from pipelines.models import hub
from pipelines.models.build import build_on_meta, describe, resolve_transform
from pipelines.models.catalogue import FAMILY, MODEL_CARDS
from pipelines.models.fingerprint import hash_state_dict
from pipelines.models.labels import resolve_class_ids, resolve_label_names
from pipelines.models.resolve import resolve_bundle
from pipelines.models.table import format_table, measure
from pipelines.models.weights import resolve_weights
from pipelines.storage.filesystem import write_bytes

SMALL = "ecaresnet26t"


@pytest.fixture(scope="module")
def small_model() -> Any:
    """Model with 7 classes."""
    torch.manual_seed(0)
    return timm.create_model(SMALL, num_classes=7).eval()


def weights_at(location: object, **options: Any) -> ModelConfig:
    return ModelConfig(weights=str(location), **({"name": SMALL} | options))


@pytest.mark.parametrize("name", MODEL_CARDS)
def test_measured_figures_match_the_model_card(name: str) -> None:
    card, measured = MODEL_CARDS[name], measure(name)
    assert measured["num_macs"] == pytest.approx(card.num_macs, rel=0.02)
    assert measured["state_dict_bytes"] == pytest.approx(card.state_dict_bytes, rel=0.002)
    assert measured["input_size"] == card.image_size
    assert measured["crop_pct"] == card.crop_pct
    assert measured["interpolation"] == card.interpolation
    if card.num_layers:
        assert str(card.num_layers) in name


def test_table_shows_card_and_measurement() -> None:
    table = format_table([measure("ecaresnet50d_pruned")])
    assert "ecaresnet50d_pruned" in table
    assert "3.29 (3.25, +1.23 %)" in table
    assert "2022" in table


def test_family_exists_in_timm() -> None:
    assert set(FAMILY) <= set(timm.list_models())
    assert set(MODEL_CARDS) <= set(FAMILY)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_other_timm_classifiers_are_described(name: str) -> None:
    module: Any = timm.create_model(name).eval()
    with torch.inference_mode():
        features = module.forward_features(torch.zeros(1, 3, 224, 224))
    architecture = describe(build_on_meta(name), (224, 224))
    assert architecture.num_classes == 1000
    assert architecture.num_features == module.forward_head(features, pre_logits=True).shape[-1]


def test_every_form_of_weights_gives_the_same_fingerprint(small_model: Any, tmp_path: Path, store: ObjectStore) -> None:
    state_dict = small_model.state_dict()
    safetensors.torch.save_file(state_dict, tmp_path / "w.safetensors")
    torch.save(state_dict, tmp_path / "w.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state_dict.items()}, "epoch": 3}, tmp_path / "w.pth.tar")
    directory = tmp_path / "directory"
    directory.mkdir()
    safetensors.torch.save_file(state_dict, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 7}))
    write_bytes("s3://scratch/w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    for name in ("model.safetensors", "config.json"):
        write_bytes(f"s3://scratch/directory/{name}", (directory / name).read_bytes())
    locations = [tmp_path / name for name in ("w.safetensors", "w.pth", "w.pth.tar", "directory")]
    bundles = [
        resolve_bundle(weights_at(location), PreprocessConfig())
        for location in (*locations, "s3://scratch/w.safetensors", "s3://scratch/directory/")
    ]
    assert len({bundle.fingerprint for bundle in bundles}) == 1
    assert {bundle.num_classes for bundle in bundles} == {7}


def test_ema_weights_are_preferred(small_model: Any, tmp_path: Path) -> None:
    ema = {key: value + 1 for key, value in small_model.state_dict().items()}
    torch.save({"state_dict": small_model.state_dict(), "state_dict_ema": ema}, tmp_path / "w.pth.tar")
    found = resolve_weights(weights_at(tmp_path / "w.pth.tar"))
    assert hash_state_dict(found.state_dict) == hash_state_dict(ema)


def test_directory_provides_model_transform_and_labels(small_model: Any, tmp_path: Path) -> None:
    safetensors.torch.save_file(small_model.state_dict(), tmp_path / "model.safetensors")
    labels = [f"class {index}" for index in range(7)]
    cfg = {"input_size": [3, 96, 96], "crop_pct": 1.0, "mean": [0.5, 0.5, 0.5]}
    config = {"architecture": SMALL, "num_classes": 7, "label_names": labels, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bundle = resolve_bundle(ModelConfig(weights=str(tmp_path)), PreprocessConfig())
    assert bundle.name == SMALL
    assert bundle.label_names == tuple(labels)
    assert bundle.transform.input_size == (96, 96)
    assert (bundle.transform.crop_pct, bundle.transform.mean) == (1.0, (0.5, 0.5, 0.5))
    with pytest.raises(RequestError, match=r"belong to ecaresnet26t, but model\.name is ecaresnet50d"):
        resolve_weights(ModelConfig(name="ecaresnet50d", weights=str(tmp_path)))


def test_every_part_of_the_identity_changes_the_fingerprint(small_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(small_model.state_dict(), path)
    changed = {key: value + 1e-3 if key == "fc.bias" else value for key, value in small_model.state_dict().items()}
    safetensors.torch.save_file(changed, tmp_path / "changed.safetensors")
    bundles = [
        resolve_bundle(weights_at(path), PreprocessConfig()),
        resolve_bundle(weights_at(tmp_path / "changed.safetensors"), PreprocessConfig()),
        resolve_bundle(weights_at(path, dtype="bfloat16"), PreprocessConfig()),
        resolve_bundle(weights_at(path), PreprocessConfig(image_size=128)),
        resolve_bundle(weights_at(path), PreprocessConfig(use_test_size=True)),
    ]
    assert len({bundle.fingerprint for bundle in bundles}) == len(bundles)


class RunsCode:
    """Object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent/marker").touch, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hostile", "loaded safely"),
        (b"not a checkpoint", "loaded safely"),
        (b"", "loaded safely"),
        ("other", "do not fit ecaresnet26t"),
        ("broken", "NaN or infinite values, in fc.bias"),
    ],
)
def test_bad_weights_are_refused_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "w.pth"
    if content == "hostile":
        torch.save({"state_dict": RunsCode()}, path)
    elif content == "other":
        torch.save(timm.create_model("resnet18").state_dict(), path)
    elif content == "broken":
        state_dict = timm.create_model(SMALL).state_dict()
        state_dict["fc.bias"][3] = float("nan")
        torch.save(state_dict, path)
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        resolve_weights(weights_at(path))
    assert "\n" not in str(caught.value)


def test_missing_weights_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        resolve_weights(weights_at(tmp_path / "absent.pth"))
    with pytest.raises(RequestError, match="no weights at"):
        resolve_weights(weights_at(tmp_path))
    with pytest.raises(RequestError, match=r"knows no model 'ecaresnet51'.*ecaresnet50d"):
        resolve_weights(ModelConfig(name="ecaresnet51"))
    with pytest.raises(RequestError, match=r"no tag 'best'; it has: a1_in1k"):
        resolve_weights(ModelConfig(name="ecaresnet50t.best"))


def test_unreachable_hub_is_reported_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **options: Any) -> None:
        assert options["timeout"] <= 5
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"nobody answers.*--model\.weights"):
        resolve_weights(ModelConfig(name="ecaresnet50t.a1_in1k"))
    assert time.monotonic() - started < 10


def test_random_weights_are_reproducible() -> None:
    config = ModelConfig(name="ecaresnet26t", weights="random")
    first, second = (hash_state_dict(resolve_weights(config).state_dict) for _ in range(2))
    assert first == second


def test_class_ids_are_wordnet_ids_for_imagenet_and_label_names_otherwise() -> None:
    imagenet = resolve_label_names({}, 1000)
    assert resolve_class_ids(imagenet)[:2] == ("n01440764", "n01443537")
    assert resolve_class_ids(("cat", "dog")) == ("cat", "dog")


def test_label_names_come_from_checkpoint_imagenet_or_indices() -> None:
    assert resolve_label_names({}, 1000)[0] == "tench, Tinca tinca"
    assert resolve_label_names({}, 3) == ("0", "1", "2")
    assert resolve_label_names({"label_names": ["a", "b"]}, 2) == ("a", "b")
    with pytest.raises(RequestError, match="names 1 classes, but the weights have 2"):
        resolve_label_names({"label_names": ["a"]}, 2)


def test_transform_uses_train_size_test_size_or_given_size() -> None:
    cfg = timm.create_model("ecaresnet50d").pretrained_cfg
    assert isinstance(cfg, dict)
    default = resolve_transform(cfg, None, False)
    assert (default.input_size, default.crop_pct) == ((224, 224), 0.875)
    test_size = resolve_transform(cfg, None, True)
    assert (test_size.input_size, test_size.crop_pct) == ((288, 288), 0.95)
    assert resolve_transform(cfg, 160, False).input_size == (160, 160)


def test_image_size_that_the_model_does_not_accept_is_refused() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", weights="random")
    with pytest.raises(RequestError, match=r"does not accept images of 100 x 100"):
        resolve_bundle(config, PreprocessConfig(image_size=100))
