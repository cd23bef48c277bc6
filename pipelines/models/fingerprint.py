"""Fingerprints: one SHA-256 over everything that decides the rows of a run."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def hash_state_dict(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors, independent of the file format.

    It covers names, dtypes, shapes and bytes, in the order of the names.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON-serializable mapping in canonical form."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
