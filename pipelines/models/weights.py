"""Every form of `model.weights`, turned into one: a checked state dict with the config that belongs to it."""

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch

from pipelines.config.sections import ModelConfig
from pipelines.errors import RequestError
from pipelines.models.build import TimmModule, build_on_meta, check_model_name, create, prefixes_of
from pipelines.models.checkpoint_config import parse_checkpoint_config
from pipelines.models.hub import load_pretrained
from pipelines.models.state_dict import read_state_dict, refuse_wrong_dtypes
from pipelines.storage import uris
from pipelines.storage.filesystem import download, list_names, read_bytes, translate_storage_errors

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
DIRECTORY_WEIGHTS = "model.safetensors"
RANDOM_SEED = 0
# Batch norm's count of training steps. Inference does not use it, and other frameworks have none.
COUNTER = "num_batches_tracked"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights that fit their architecture.

    Attributes:
        name: timm's name, with the tag where one was given.
        module: timm's, on the meta device: the architecture that the weights fit. It has no classes if the weights
            have no classifier.
        state_dict: On the CPU.
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

    Weights without a classifier are accepted: whoever needs classes has to look at the module's `num_classes`.

    Raises:
        RequestError: Unknown model, nothing there, not a weights file, or weights of another architecture.
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
    with translate_storage_errors("read the weights", location):
        names = list_names(location)
        if DIRECTORY_WEIGHTS not in names or "config.json" not in names:
            raise RequestError(
                f"no weights at {location}: expected a file ending in {', '.join(CHECKPOINT_SUFFIXES)}, or a folder "
                f"with {DIRECTORY_WEIGHTS} and config.json"
            )
        content = read_bytes(uris.join(location, "config.json"))
    checkpoint_config = parse_checkpoint_config(content, location)
    architecture = checkpoint_config["architecture"]
    check_model_name(architecture)
    name = config.name if config.is_set("name") else architecture
    if name.partition(".")[0] != architecture:
        raise RequestError(f"the weights at {location} are of {architecture}, but model.name is {name}")
    # As timm reads its own directories: the checkpoint's values over the model's.
    cfg = _model_cfg(name) | (checkpoint_config.get("pretrained_cfg") or {})
    state_dict = _load_file(uris.join(location, DIRECTORY_WEIGHTS))
    return _checked(config, name, state_dict, cfg, checkpoint_config)


def _model_cfg(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, "timm knows the name"
    return dict(cfg.to_dict())


def _load_file(location: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder, translate_storage_errors("read the weights", location):
        return read_state_dict(download(location, folder), location)


def _checked(
    config: ModelConfig,
    name: str,
    state_dict: dict[str, torch.Tensor],
    pretrained_cfg: dict[str, Any],
    checkpoint_config: dict[str, Any],
) -> Weights:
    module = build_on_meta(name, _num_classes(name, state_dict))
    if _names_of_values(module.state_dict()) - state_dict.keys():
        state_dict = _without_wrapper(name, state_dict, config.weights)
        module = build_on_meta(name, _num_classes(name, state_dict))
    expected = module.state_dict()
    state_dict = state_dict | _reset_counters(expected, state_dict)
    _refuse_other_architecture(config, name, expected, state_dict)
    refuse_wrong_dtypes(expected, state_dict, config.weights)
    broken = [key for key, _ in module.named_parameters() if not state_dict[key].float().isfinite().all()]
    if broken:
        raise RequestError(f"the weights {config.weights} hold NaN or infinite values, in {broken[0]}")
    return Weights(name, module, state_dict, pretrained_cfg, checkpoint_config)


def _refuse_other_architecture(
    config: ModelConfig, name: str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = sorted(key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape)
    counts = [
        f"{len(keys)} {what} (such as {keys[0]!r})"
        for keys, what in ((missing, "missing"), (unexpected, "unknown"), (reshaped, "of another shape"))
        if keys
    ]
    if counts:
        raise RequestError(f"the weights {config.weights} do not fit {name}: tensors {', '.join(counts)}")


def _without_wrapper(name: str, state_dict: dict[str, torch.Tensor], location: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the model inside a wrapper, if exactly one wrapper holds all of its backbone.

    Wrappers put a prefix before the names: `timm_model.` (Hugging Face), `model.` (Lightning), `backbone.` (DINO).

    Raises:
        RequestError: Several wrappers do, such as `encoder_q.` and `encoder_k.` (MoCo).
    """
    backbone = _names_of_values(build_on_meta(name, num_classes=0).state_dict())
    first = min(backbone)
    prefixes = {key.removesuffix(first) for key in state_dict if key.endswith(f".{first}")}
    fitting = sorted(prefix for prefix in prefixes if all(prefix + key in state_dict for key in backbone))
    if not fitting:
        return state_dict
    if len(fitting) > 1:
        raise RequestError(f"{location} holds several models, under {', '.join(fitting)}: save the one that you mean")
    inner = {key.removeprefix(fitting[0]): value for key, value in state_dict.items() if key.startswith(fitting[0])}
    num_others = len(state_dict) - len(inner)
    log.info("took the tensors %s* of %s for %s; others: %d", fitting[0], location, name, num_others)
    return inner


def _names_of_values(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith(COUNTER)}


def _num_classes(name: str, state_dict: dict[str, torch.Tensor]) -> int | None:
    """Return the rows of the classifier, 0 if there is none, or None (the model's own) if its shape does not say."""
    prefixes = prefixes_of(_model_cfg(name))
    if not any(key.startswith(prefixes) for key in state_dict):
        return 0
    weight = state_dict.get(f"{prefixes[0]}weight")
    return int(weight.shape[0]) if weight is not None and weight.dim() else None


def _reset_counters(expected: dict[str, torch.Tensor], state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return zeros for the counters that are missing or have another type, as torch itself does for old files."""
    counters = [key for key in expected if key.endswith(COUNTER)]
    return {
        key: torch.zeros((), dtype=torch.int64)
        for key in counters
        if key not in state_dict or state_dict[key].shape != () or state_dict[key].dtype != torch.int64
    }


def timm_version() -> str:
    """Return the version of timm, part of the fingerprint."""
    return str(timm.__version__)
