"""Checkpoints: the state to resume from, and the model as a timm directory, which every job accepts as weights."""

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
    """Write a state of tensors and plain values into a folder."""
    torch.save(state, folder / STATE_FILE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read a state written by `save_state`, without running code from the file.

    Raises:
        RequestError: The file is damaged, or is not a checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors on files that are not checkpoints
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{STATE_FILE} is not a checkpoint that can be loaded safely: {reason}") from None
    return state


def describe_model(name: str, class_names: tuple[str, ...], transform: EvalTransform) -> dict[str, Any]:
    """Return the facts about a model that its state dict lacks, as plain values."""
    return {"name": name, "class_names": list(class_names), "transform": asdict(transform)}


def save_timm_directory(
    folder: Path, module: TimmModule, class_names: tuple[str, ...], transform: EvalTransform
) -> None:
    """Write `model.safetensors` and `config.json` in the format that timm reads from a `local-dir:`.

    Args:
        folder: Folder to write to; created if it does not exist.
        module: timm model.
        class_names: Name of the class of each logit, saved as `label_names`.
        transform: Eval transform, saved as the model's default.
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
    # Safetensors does not accept channels-last tensors.
    plain = copy.deepcopy(module).to(device="cpu", memory_format=torch.contiguous_format)
    plain.pretrained_cfg = plain.pretrained_cfg | {"tag": None}  # the tag names the pretrained weights
    save_for_hf(plain, str(folder), model_config, safe_serialization=True, data_config=data_config)
