"""Every form of `model.weights`, to one: a checked state dict with the config that belongs to it."""

import json
import posixpath
import tempfile
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import load_state_dict

from pipelines.config.sections import ModelConfig
from pipelines.errors import RequestError
from pipelines.models.build import TimmModule, build_on_meta, check_model_name, create
from pipelines.models.hub import load_pretrained
from pipelines.storage import uris
from pipelines.storage.filesystem import download, in_plain_words, list_names, read_bytes

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
DIRECTORY_WEIGHTS = "model.safetensors"
RANDOM_SEED = 0


@dataclass(frozen=True)
class Weights:
    """Weights that fit their architecture.

    Attributes:
        name: timm's name, with the tag where one was given.
        module: timm's, on the meta device: the architecture that the weights fit.
        state_dict: on the CPU.
        pretrained_cfg: timm's, of the checkpoint where it has one, else of the model.
        checkpoint_config: `config.json` of a timm directory; empty otherwise.
    """

    name: str
    module: TimmModule
    state_dict: dict[str, torch.Tensor]
    pretrained_cfg: dict[str, Any]
    checkpoint_config: dict[str, Any]


def resolve_weights(config: ModelConfig) -> Weights:
    """Find, load and check the weights that a config names.

    Raises:
        RequestError: unknown model, nothing there, not a weights file, or weights of another architecture.
    """
    check_model_name(config.name)
    if config.weights == "pretrained":
        state_dict, cfg = load_pretrained(config.name)
        return _checked(config, config.name, state_dict, cfg, {})
    if config.weights == "random":
        torch.manual_seed(RANDOM_SEED)
        module = create(config.name)
        return _checked(config, config.name, dict(module.state_dict()), dict(module.pretrained_cfg), {})
    location = uris.normalize(config.weights)
    if location.endswith(CHECKPOINT_SUFFIXES):
        return _checked(config, config.name, _load_file(location), _model_cfg(config.name), {})
    return _from_directory(config, location)


def _from_directory(config: ModelConfig, location: str) -> Weights:
    with in_plain_words("read the weights", location):
        names = list_names(location)
        if DIRECTORY_WEIGHTS not in names or "config.json" not in names:
            raise RequestError(
                f"no weights at {location}: expected a file ending in {', '.join(CHECKPOINT_SUFFIXES)}, or a folder "
                f"with {DIRECTORY_WEIGHTS} and config.json"
            )
        content = read_bytes(uris.join(location, "config.json"))
    try:
        checkpoint_config = json.loads(content)
        architecture = checkpoint_config["architecture"]
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{location}/config.json is not a timm config: it names no architecture") from None
    check_model_name(architecture)
    name = config.name if config.is_set("name") else architecture
    if name.partition(".")[0] != architecture:
        raise RequestError(f"the weights at {location} are of {architecture}, but model.name is {name}")
    # As timm reads its own directories: the checkpoint's values over the model's.
    cfg = _model_cfg(name) | checkpoint_config.get("pretrained_cfg", {})
    state_dict = _load_file(uris.join(location, DIRECTORY_WEIGHTS))
    return _checked(config, name, state_dict, cfg, checkpoint_config)


def _model_cfg(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, "timm knows the name"
    return dict(cfg.to_dict())


def _load_file(location: str) -> dict[str, torch.Tensor]:
    """A state dict from one file, by timm's rules (EMA first, wrappers' prefixes removed); never runs its code."""
    with tempfile.TemporaryDirectory() as folder, in_plain_words("read the weights", location):
        path = download(location, folder)
        try:
            loaded = load_state_dict(path, use_ema=True, weights_only=True)
        except Exception as error:  # torch fails on a stranger's bytes in as many ways as there are bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(f"{location} holds no weights that can be loaded safely: {reason}") from None
    state_dict = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not state_dict:
        raise RequestError(f"{posixpath.basename(location)} holds no tensors")
    return state_dict


def _checked(
    config: ModelConfig,
    name: str,
    state_dict: dict[str, torch.Tensor],
    pretrained_cfg: dict[str, Any],
    checkpoint_config: dict[str, Any],
) -> Weights:
    module = build_on_meta(name, _num_classes(state_dict, pretrained_cfg))
    expected = module.state_dict()
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    reshaped = sorted(
        key for key in expected.keys() & state_dict.keys() if expected[key].shape != state_dict[key].shape
    )
    if missing or unexpected or reshaped:
        counts = [
            f"{len(keys)} {what} (such as {keys[0]})"
            for keys, what in ((missing, "missing"), (unexpected, "unknown"), (reshaped, "of another shape"))
            if keys
        ]
        raise RequestError(f"the weights {config.weights} do not fit {name}: tensors {', '.join(counts)}")
    broken = [key for key, _ in module.named_parameters() if not state_dict[key].float().isfinite().all()]
    if broken:
        raise RequestError(f"the weights {config.weights} hold NaN or infinite values, in {broken[0]}")
    return Weights(name, module, state_dict, pretrained_cfg, checkpoint_config)


def _num_classes(state_dict: dict[str, torch.Tensor], pretrained_cfg: dict[str, Any]) -> int | None:
    """Rows of the classifier in the checkpoint; None, the model's own, where it has none."""
    classifier = pretrained_cfg.get("classifier")
    first = classifier[0] if isinstance(classifier, list | tuple) and classifier else classifier
    weight = state_dict.get(f"{first}.weight")
    return None if weight is None else int(weight.shape[0])


def timm_version() -> str:
    """The version of timm, part of the fingerprint."""
    return str(timm.__version__)
