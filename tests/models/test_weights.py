"""Weights files from other sources: old, wrapped, without a classifier, damaged and hostile."""

import json
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from pipelines.config.infer import InferConfig
from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.errors import RequestError
from pipelines.inference.request import resolve_outputs
from pipelines.models.bundle import ModelBundle
from pipelines.models.cpu.int8 import quantize_bundle
from pipelines.models.resolve import prepare_bundle, resolve_bundle
from pipelines.models.weights import resolve_weights

NAME = "test_resnet"
NUM_CLASSES = 3
State = dict[str, torch.Tensor]


def state_of(name: str = NAME, num_classes: int = NUM_CLASSES) -> State:
    torch.manual_seed(0)
    state: State = timm.create_model(name, num_classes=num_classes).state_dict()
    return state


def save(state: Any, path: Path) -> ModelConfig:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return ModelConfig(name=NAME, weights=str(path))


def bundle_of(model: ModelConfig) -> ModelBundle:
    return prepare_bundle(resolve_bundle(model, PreprocessConfig(image_size=64)))


def outputs_of(bundle: ModelBundle) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and features for a fixed batch of noise."""
    assert isinstance(bundle.module, torch.nn.Module)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, features = bundle.module(images)
    return logits, features


@pytest.mark.parametrize(
    ("suffix", "counter"),
    [(".pth", None), (".safetensors", torch.ones(1, dtype=torch.int64)), (".safetensors", torch.tensor(5.0))],
)
def test_batch_norm_counters_are_optional(counter: torch.Tensor | None, suffix: str, tmp_path: Path) -> None:
    state = state_of()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert counters
    rest = {key: value for key, value in state.items() if key not in counters}
    changed = rest if counter is None else rest | {key: counter.clone() for key in counters}
    found, expected = (
        outputs_of(bundle_of(save(weights, tmp_path / f"{number}{suffix}")))
        for number, weights in enumerate((changed, state))
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("test_convnext", "mobilenetv3_small_050", "levit_128s")
        ),
    ],
)
def test_backbone_without_classifier_gives_the_same_embeddings(name: str, tmp_path: Path) -> None:
    whole = state_of(name)
    names = timm.create_model(name, num_classes=0).state_dict().keys()
    size = PreprocessConfig(image_size=None if name in ("test_vit", "levit_128s") else 64)
    bundles = []
    for number, state in enumerate((whole, {key: value for key, value in whole.items() if key in names})):
        model = save(state, tmp_path / f"{number}.pth").model_copy(update={"name": name})
        bundles.append(resolve_bundle(model, size))
    with_classes, without = bundles
    assert (with_classes.num_classes, without.num_classes, without.label_names) == (NUM_CLASSES, 0, ())
    assert with_classes.num_features == without.num_features
    images = torch.randn(2, 3, *without.transform.input_size)
    features = []
    for bundle in bundles:
        assert isinstance(bundle.module, torch.nn.Module)
        with torch.inference_mode():
            features.append(bundle.module(images)[1])
    assert torch.equal(*features)


def test_classes_are_refused_if_the_weights_have_no_classifier(tmp_path: Path) -> None:
    bundle = bundle_of(save(state_of(num_classes=0), tmp_path / "backbone.pth"))
    base: dict[str, Any] = {"input": {"uri": "/in"}, "output": {"uri": "/out"}}
    assert resolve_outputs(InferConfig.model_validate(base | {"outputs": {"topk": 0}}), bundle).topk == 0
    for outputs in ({}, {"topk": 1}):
        with pytest.raises(RequestError, match=r"no classifier.*outputs\.topk to 0"):
            resolve_outputs(InferConfig.model_validate(base | {"outputs": outputs}), bundle)
    with pytest.raises(RequestError, match="needs a classifier"):
        quantize_bundle(bundle, torch.zeros(2, 64, 64, 3, dtype=torch.uint8).numpy(), ModelConfig().quantization)


def test_label_names_of_a_directory_without_classifier_are_ignored(tmp_path: Path) -> None:
    safetensors.torch.save_file(state_of(num_classes=0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, "label_names": ["a", "b"]}))
    assert bundle_of(ModelConfig(weights=str(tmp_path))).label_names == ()


@pytest.mark.parametrize(
    "prefix", ["timm_model.", "model.", "module.", "module.model.", "backbone.", "module.encoder_q."]
)
@pytest.mark.parametrize("num_classes", [0, NUM_CLASSES])
def test_weights_inside_a_wrapper_are_found(prefix: str, num_classes: int, tmp_path: Path) -> None:
    state = state_of(num_classes=num_classes)
    wrapped = {f"{prefix}{key}": value for key, value in state.items()}
    if prefix != "module.":  # timm strips this prefix, so other tensors could not be told from those of the model
        wrapped["projector.weight"], wrapped["queue"] = torch.zeros(2, 2), torch.zeros(3)
    found = resolve_weights(save({"state_dict": wrapped}, tmp_path / "w.pth"))
    assert found.state_dict.keys() == state.keys()
    assert all(torch.equal(found.state_dict[key], value) for key, value in state.items())


def test_file_with_several_models_is_refused(tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for prefix in ("encoder_k.", "encoder_q.") for key, value in state_of().items()}
    with pytest.raises(RequestError, match=r"several models, under encoder_k\., encoder_q\."):
        resolve_weights(save(state, tmp_path / "w.pth"))


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"1 unknown \(such as 'odd\\x1b'\)"):
        resolve_weights(save(state_of() | {"odd\x1b": torch.zeros(1)}, tmp_path / "w.pth"))


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], State]:
    def make() -> State:
        state = state_of()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return state | {key: change(state[key])}

    return make


def all_changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], State]:
    return lambda: {key: change(value) if value.dim() else value for key, value in state_of().items()}


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (all_changed(torch.Tensor.to_sparse), "sparse"),
        (changed("fc.weight", torch.Tensor.to_sparse_csr), "sparse"),
        (changed("fc.weight", quantized), "quantized"),
        (all_changed(lambda tensor: tensor.to("meta")), "meta"),
        (changed("fc.bias", lambda tensor: tensor.to("meta")), "meta"),
        (changed("fc.weight", lambda tensor: tensor.to(torch.complex64)), "complex64"),
        (all_changed(lambda tensor: tensor.to(torch.int8)), "int8"),
        (changed("fc.bias", lambda tensor: tensor.bool()), "bool"),
        (changed("fc.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)), "float8"),
        (changed("fc.weight", lambda tensor: tensor.sum()), "with a different shape"),
        (changed("fc.bias", lambda tensor: tensor.sum()), "with a different shape"),
        (changed("fc.weight", lambda tensor: tensor[:0]), "with a different shape|unknown"),
        (changed("fc.bias", lambda tensor: tensor * torch.inf), "NaN or infinite"),
        (lambda: {"state_dict": 5}, "not a dictionary"),
        (lambda: [1, 2], "not a dictionary"),
        (lambda: 5, "not a dictionary"),
        (lambda: {1: torch.zeros(1)}, "not a dictionary"),
        (lambda: {"epoch": 5, "lr": 0.1}, "no tensors"),
        (lambda: {}, "no tensors"),
    ],
)
@pytest.mark.filterwarnings("error")  # warnings of torch would reach the user's terminal
def test_hostile_tensors_are_refused_in_one_line(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    model = save(make(), tmp_path / "w.pth")
    with pytest.raises(RequestError, match=message) as caught:
        resolve_bundle(model, PreprocessConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: expanded(700_000, 1), lambda: expanded(3, 500)])
def test_expanding_file_is_refused_before_it_fills_the_memory(make: Callable[[], State], tmp_path: Path) -> None:
    model = save(make(), tmp_path / "w.pth")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=r"expand to [\d,]+"):
            resolve_weights(model)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def expanded(num_rows: int, num_copies: int) -> State:
    """Return a state dict with a large classifier and other tensors that repeat a single value with a stride of 0."""
    state = state_of()
    width = state["fc.weight"].shape[1]
    state |= {"fc.weight": torch.zeros(1).expand(num_rows, width), "fc.bias": torch.zeros(1).expand(num_rows)}
    return state | {f"copy{number}": torch.zeros(1).expand(10**6) for number in range(num_copies - 1)}


def test_compressed_archive_is_refused_before_it_is_read(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(50_000_000, dtype=torch.uint8)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(RequestError, match=r"would expand to 50,000,\d+ bytes"):
        resolve_weights(ModelConfig(name=NAME, weights=str(tmp_path / "w.pth")))


def test_tied_tensors_and_half_precision_load(tmp_path: Path) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in state_of().items()}
    assert bundle_of(save(state, tmp_path / "half.pth")).num_classes == NUM_CLASSES
    shared = state_of()
    twins = [key for key in shared if key.endswith("bn1.bias") or key.endswith("bn1.weight")][:2]
    shared[twins[1]] = shared[twins[0]]
    assert bundle_of(save(shared, tmp_path / "tied.pth")).num_classes == NUM_CLASSES


ODD_VALUES: list[Any] = [
    None,
    5,
    -1,
    0,
    1e300,
    "x",
    "",
    [],
    [5],
    [[]],
    {},
    {"a": 1},
    True,
    [None, None, None],
    [3, 0, 0],
    [3, 1e9, 5],
]
KEYS = ["architecture", "label_names", "pretrained_cfg"]
CFG_KEYS = [
    "input_size",
    "test_input_size",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "interpolation",
    "mean",
    "std",
    "classifier",
    "label_names",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    safetensors.torch.save_file(state_of(), folder / "model.safetensors")
    return folder


def resolve_with(directory: Path, content: bytes) -> ModelBundle:
    (directory / "config.json").write_bytes(content)
    return resolve_bundle(ModelConfig(weights=str(directory)), PreprocessConfig(use_test_size=True))


@pytest.mark.parametrize("key", [*KEYS, *(f"pretrained_cfg.{key}" for key in CFG_KEYS)])
def test_config_with_wrong_types_is_refused_in_one_line(key: str, directory: Path) -> None:
    num_refused = 0
    for value in ODD_VALUES:
        config: dict[str, Any] = {"architecture": NAME, "pretrained_cfg": {"input_size": [3, 64, 64]}}
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
        found = bundle_or_reason(directory, json.dumps(config).encode())
        if isinstance(found, str):
            num_refused += 1
            assert found.isprintable()
        else:
            assert len(found.label_names) == NUM_CLASSES
            assert found.transform.resized_size(640, 480, 10**9)
    assert num_refused >= 5


def bundle_or_reason(directory: Path, content: bytes) -> ModelBundle | str:
    try:
        return resolve_with(directory, content)
    except RequestError as error:
        return str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"5",
        b"null",
        b"{",
        b"\x00\xff\xfe",
        b"[" * 100_000,
        b'{"architecture": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"architecture": "test_resnet", "pretrained_cfg": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"architecture": "test_resnet", "label_names": ["\\ud800", "b", "c"]}',
        b'{"architecture": "test_resnet", "pretrained_cfg": {"crop_pct": NaN}}',
        b'{"num_classes": 3}',
        b'{"architecture": "\\u001b[31m"}',
    ],
)
def test_damaged_config_is_refused_in_one_line(content: bytes, directory: Path) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_with(directory, content)
    assert str(caught.value).isprintable()


def test_config_with_nulls_and_unknown_keys_is_accepted(directory: Path) -> None:
    cfg = {"input_size": [3, 64, 64], "crop_mode": None, "test_input_size": None, "url": "", "tag": "x"}
    config = {"architecture": NAME, "num_classes": 3, "label_names": ["a", 2, "c"], "pretrained_cfg": cfg, "more": 1}
    bundle = resolve_with(directory, b"\xef\xbb\xbf" + json.dumps(config).encode())
    assert bundle.label_names == ("a", "2", "c")
    assert bundle.transform.input_size == (64, 64)
