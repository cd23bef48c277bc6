"""A checkpoint: the state to go on from, and the model as a timm directory, which every job takes as weights."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf

from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform
from pipelines.models.build import TimmModule

STATE_FILE = "state.pt"
TIMM_FILES = ("model.safetensors", "config.json")


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values."""
    torch.save(state, folder / STATE_FILE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; runs no code from the file.

    Raises:
        RequestError: it is something else, or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch fails on a stranger's bytes in as many ways as there are bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{STATE_FILE} is no checkpoint that can be loaded safely: {reason}") from None
    return state


def describe_model(name: str, class_names: tuple[str, ...], transform: EvalTransform) -> dict[str, Any]:
    """What a state dict does not say of its model, as plain values."""
    return {"name": name, "class_names": list(class_names), "transform": asdict(transform)}


def save_timm_directory(
    folder: Path, module: TimmModule, class_names: tuple[str, ...], transform: EvalTransform
) -> None:
    """Write `model.safetensors` and `config.json`, as timm reads them from a `local-dir:`.

    Args:
        folder: is made where it is not there.
        module: timm's.
        class_names: one a logit, kept as `label_names`.
        transform: of evaluation, kept as the model's own.
    """
    data_config = {
        "input_size": (3, *transform.input_size),
        "crop_pct": transform.crop_pct,
        "crop_mode": transform.crop_mode,
        "interpolation": transform.interpolation,
        "mean": transform.mean,
        "std": transform.std,
    }
    model_config = {"label_names": list(class_names)}
    # Safetensors takes no channels-last tensors.
    plain = copy.deepcopy(module).to(device="cpu", memory_format=torch.contiguous_format)
    plain.pretrained_cfg = plain.pretrained_cfg | {"tag": None}  # it names other weights
    save_for_hf(plain, str(folder), model_config, safe_serialization=True, data_config=data_config)
