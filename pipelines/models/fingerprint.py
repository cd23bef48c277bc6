"""What makes two runs give the same rows, as one SHA-256."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def hash_state_dict(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors, whatever file they came from: names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping, in one canonical spelling."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
