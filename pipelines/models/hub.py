"""timm's pretrained weights, from the model hub or its local cache."""

from typing import Any

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

from pipelines.errors import RequestError

# timm itself retries for close to a minute when nobody answers.
HUB_TIMEOUT_S = 5
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ELSEWHERE = "name weights from elsewhere with --model.weights PATH_OR_URI (or random, for a trial)"


def why_unavailable(name: str) -> str | None:
    """Why the pretrained weights of `name` cannot be had here, found within `HUB_TIMEOUT_S`; None if they can be."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None or not cfg.has_weights:
        return f"timm has no pretrained weights for {name}"
    if not cfg.hf_hub_id or any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in WEIGHT_FILES):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(cfg.hf_hub_id, WEIGHT_FILES[0]), timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the hub client raises its HTTP library's own errors
        reason = " ".join(str(error).split())[:200]
        return f"the model hub ({constants.ENDPOINT}) does not hand out {cfg.hf_hub_id}: {reason}"
    return None


def load_pretrained(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Timm's pretrained state dict of `name`, and its `pretrained_cfg`.

    Raises:
        RequestError: there are none, or the hub is out of reach; says how to name others.
    """
    reason = why_unavailable(name)
    if reason:
        raise RequestError(f"{reason}; {ELSEWHERE}")
    try:
        module: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # any of timm's, the hub client's or the network's
        raise RequestError(f"cannot fetch the pretrained weights of {name}: {error}; {ELSEWHERE}") from None
    return dict(module.state_dict()), dict(module.pretrained_cfg)
