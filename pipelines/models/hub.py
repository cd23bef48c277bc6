"""timm's pretrained weights, from the model hub or its local cache."""

from typing import Any

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

from pipelines.errors import RequestError

# timm itself retries for almost a minute if the hub does not answer.
HUB_TIMEOUT_S = 5
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ADVICE = "set --model.weights to a path or URI of other weights (or to random, for a trial)"


def why_unavailable(name: str) -> str | None:
    """Return why the pretrained weights of `name` are unavailable, or None if they are available.

    The hub is asked with a timeout of `HUB_TIMEOUT_S`.
    """
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None or not cfg.has_weights:
        return f"timm has no pretrained weights for {name}"
    if not cfg.hf_hub_id or any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in WEIGHT_FILES):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(cfg.hf_hub_id, WEIGHT_FILES[0]), timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the hub client lets the errors of its HTTP library through
        reason = " ".join(str(error).split())[:200]
        return f"cannot get {cfg.hf_hub_id} from the model hub ({constants.ENDPOINT}): {reason}"
    return None


def load_pretrained(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return timm's pretrained state dict of `name`, and its `pretrained_cfg`.

    Raises:
        RequestError: There are no such weights, or the hub cannot be reached.
    """
    reason = why_unavailable(name)
    if reason:
        raise RequestError(f"{reason}; {ADVICE}")
    try:
        module: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the hub client and the network each raise their own errors
        raise RequestError(f"cannot fetch the pretrained weights of {name}: {error}; {ADVICE}") from None
    return dict(module.state_dict()), dict(module.pretrained_cfg)
