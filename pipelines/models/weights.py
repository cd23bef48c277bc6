"""Loading of `model.weights` in all its forms, into a checked state dict with its config."""

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch

from pipelines.config.sections import ModelConfig
from pipelines.errors import RequestError
from pipelines.models.build import TimmModule, build_on_meta, check_model_name, create, prefixes_from_cfg
from pipelines.models.checkpoint_config import parse_checkpoint_config
from pipelines.models.hub import load_pretrained
from pipelines.models.state_dict import read_state_dict, refuse_wrong_dtypes
from pipelines.storage import uris
from pipelines.storage.filesystem import download, list_names, read_bytes, translate_storage_errors

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
DIRECTORY_WEIGHTS = "model.safetensors"
RANDOM_SEED = 0
# Counter of training steps in batch norms. Inference does not use it, and other frameworks do not have it.
COUNTER = "num_batches_tracked"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights that are known to fit their architecture.

    Attributes:
        name: timm's name, including the tag if one was given.
        module: timm module on the meta device. It has no classes if the weights have no classifier.
        state_dict: Tensors on the CPU.
        pretrained_cfg: timm's config of the checkpoint if it has one, otherwise of the model.
        checkpoint_config: Content of the `config.json` of a timm directory; empty for other forms.
    """

    name: str
    module: TimmModule
    state_dict: dict[str, torch.Tensor]
    pretrained_cfg: dict[str, Any]
    checkpoint_config: dict[str, Any]


def resolve_weights(config: ModelConfig) -> Weights:
    """Find, load and check the weights that a config names.

    Weights without a classifier are accepted. Callers that need classes have to check `num_classes` of the module.

    Raises:
        RequestError: The model is unknown, the weights do not exist, the file does not contain weights, or they belong
            to a different architecture.
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
        raise RequestError(f"the weights at {location} belong to {architecture}, but model.name is {name}")
    # Like timm for its own directories: values of the checkpoint override those of the model.
    cfg = _model_cfg(name) | (checkpoint_config.get("pretrained_cfg") or {})
    state_dict = _load_file(uris.join(location, DIRECTORY_WEIGHTS))
    return _checked(config, name, state_dict, cfg, checkpoint_config)


def _model_cfg(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, "check_model_name accepted the name"
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
    if _weight_names(module.state_dict()) - state_dict.keys():
        state_dict = _unwrap(name, state_dict, config.weights)
        module = build_on_meta(name, _num_classes(name, state_dict))
    expected = module.state_dict()
    state_dict = state_dict | _reset_counters(expected, state_dict)
    _refuse_other_architecture(config, name, expected, state_dict)
    refuse_wrong_dtypes(expected, state_dict, config.weights)
    broken = [key for key, _ in module.named_parameters() if not state_dict[key].float().isfinite().all()]
    if broken:
        raise RequestError(f"the weights {config.weights} contain NaN or infinite values, in {broken[0]}")
    return Weights(name, module, state_dict, pretrained_cfg, checkpoint_config)


def _refuse_other_architecture(
    config: ModelConfig, name: str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = sorted(key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape)
    counts = [
        f"{len(keys)} {problem} (such as {keys[0]!r})"
        for keys, problem in ((missing, "missing"), (unexpected, "unknown"), (reshaped, "with a different shape"))
        if keys
    ]
    if counts:
        raise RequestError(f"the weights {config.weights} do not fit {name}: tensors {', '.join(counts)}")


def _unwrap(name: str, state_dict: dict[str, torch.Tensor], location: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the model without the prefix of a wrapper, if exactly one prefix has the whole backbone.

    Wrappers add a prefix to the names: `timm_model.` (Hugging Face), `model.` (Lightning), `backbone.` (DINO).

    Raises:
        RequestError: Several prefixes have the whole backbone, such as `encoder_q.` and `encoder_k.` (MoCo).
    """
    backbone = _weight_names(build_on_meta(name, num_classes=0).state_dict())
    first = min(backbone)
    prefixes = {key.removesuffix(first) for key in state_dict if key.endswith(f".{first}")}
    fitting = sorted(prefix for prefix in prefixes if all(prefix + key in state_dict for key in backbone))
    if not fitting:
        return state_dict
    if len(fitting) > 1:
        raise RequestError(f"{location} contains several models, under {', '.join(fitting)}: save only one of them")
    inner = {key.removeprefix(fitting[0]): value for key, value in state_dict.items() if key.startswith(fitting[0])}
    num_others = len(state_dict) - len(inner)
    log.info("using the tensors %s* in %s as %s; ignored other tensors: %d", fitting[0], location, name, num_others)
    return inner


def _weight_names(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith(COUNTER)}


def _num_classes(name: str, state_dict: dict[str, torch.Tensor]) -> int | None:
    """Return the number of classes, 0 without a classifier, or None (the model's own) if its shape does not tell."""
    prefixes = prefixes_from_cfg(_model_cfg(name))
    if not any(key.startswith(prefixes) for key in state_dict):
        return 0
    weight = state_dict.get(f"{prefixes[0]}weight")
    return int(weight.shape[0]) if weight is not None and weight.dim() else None


def _reset_counters(expected: dict[str, torch.Tensor], state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return zeros for counters that are missing or have a wrong type, as torch itself does for old files."""
    counters = [key for key in expected if key.endswith(COUNTER)]
    return {
        key: torch.zeros((), dtype=torch.int64)
        for key in counters
        if key not in state_dict or state_dict[key].shape != () or state_dict[key].dtype != torch.int64
    }


def timm_version() -> str:
    """Return the version of timm, which is part of the fingerprint."""
    return str(timm.__version__)
