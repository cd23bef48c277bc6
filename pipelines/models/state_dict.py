"""Tensors of a weights file: read without running its code, and refused where they are no plain weights."""

import os
import warnings
import zipfile
from collections.abc import Mapping

import torch
from timm.models import load_state_dict

from pipelines.errors import RequestError

# Tensors that share their memory count once for each name, as tied embeddings and classifiers do.
MAX_EXPANSION = 2
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_state_dict(path: str, location: str) -> dict[str, torch.Tensor]:
    """Read a state dict by timm's rules: the EMA first, without the prefixes of DDP and `torch.compile`.

    Args:
        path: A local file.
        location: Its URI, for messages.

    Raises:
        RequestError: The file holds no tensors, cannot be loaded without running its code, expands far beyond its
            size, or holds tensors that are not dense.
    """
    _refuse_compressed(path, location)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of sparse and quantized tensors, which are refused below
            loaded = load_state_dict(path, use_ema=True, weights_only=True)
            named = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # torch fails on a stranger's bytes in as many ways as there are bytes
        raise RequestError(f"{location} holds no weights that can be loaded safely: {_reason(error)}") from None
    if not named:
        raise RequestError(f"{location} holds no tensors")
    _refuse_odd_tensors(named, location)
    _refuse_expanded(named, os.path.getsize(path), location)
    return named


def refuse_wrong_dtypes(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], location: str) -> None:
    """Refuse weights that are no floating-point numbers, and indices that are no integers.

    Args:
        expected: The state dict of the model.
        found: One of the same names and shapes.
        location: Where it was found, for messages.

    Raises:
        RequestError: Names the first tensor of a wrong type.
    """
    for name, tensor in found.items():
        is_float = expected[name].is_floating_point()
        is_right = (
            tensor.dtype in WEIGHT_DTYPES if is_float else not (tensor.is_floating_point() or tensor.is_complex())
        )
        if not is_right:
            wanted = "float32, float16, bfloat16 or float64" if is_float else "integers"
            raise RequestError(f"the weights {location} hold {tensor.dtype} in {name}, where the model needs {wanted}")


def _reason(error: Exception) -> str:
    if isinstance(error, AttributeError):  # timm asks for the items of what is no dictionary, or for a number's prefix
        return "its content is no dictionary from names to tensors"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _refuse_compressed(path: str, location: str) -> None:
    """Refuse archives that torch did not write: it compresses nothing, so they cannot expand."""
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # no archive, or a damaged one: the loader says what is wrong
    if num_bytes > os.path.getsize(path):
        raise RequestError(f"{location} would expand to {num_bytes:,} bytes; save it with torch.save, uncompressed")


def _refuse_odd_tensors(named: Mapping[str, torch.Tensor], location: str) -> None:
    for name, tensor in named.items():
        kinds = {
            "a meta tensor, which has no values": tensor.is_meta,
            "quantized": tensor.is_quantized,
            "nested": tensor.is_nested,
            "sparse": tensor.layout != torch.strided,
            f"of type {tensor.dtype}": tensor.is_complex(),
        }
        for kind, applies in kinds.items():
            if applies:
                raise RequestError(f"{location} cannot be used: its tensor {name!r} is {kind}; save dense weights")


def _refuse_expanded(named: Mapping[str, torch.Tensor], file_bytes: int, location: str) -> None:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    if num_bytes > MAX_EXPANSION * file_bytes:
        raise RequestError(
            f"{location} has {file_bytes:,} bytes, but its tensors expand to {num_bytes:,}: "
            "some of them repeat a few values; save them with .contiguous()"
        )
