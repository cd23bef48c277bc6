"""Safe reading of weights files: without running their code, and only if they contain plain tensors."""

import os
import warnings
import zipfile
from collections.abc import Mapping

import torch
from timm.models import load_state_dict

from pipelines.errors import RequestError

# Tensors that share memory count once per name. Tied embeddings and classifiers therefore need a factor of two.
MAX_EXPANSION = 2
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_state_dict(path: str, location: str) -> dict[str, torch.Tensor]:
    """Read a state dict by timm's rules: prefer EMA weights, and remove the prefixes of DDP and `torch.compile`.

    Args:
        path: Path of the local file.
        location: URI that the file came from, for messages.

    Raises:
        RequestError: The file contains no tensors, cannot be loaded without running its code, expands far beyond its
            size, or contains tensors that are not dense.
    """
    _refuse_compressed(path, location)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about sparse and quantized tensors, which are refused below
            loaded = load_state_dict(path, use_ema=True, weights_only=True)
            named = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # torch raises all kinds of errors on bytes that are not a checkpoint
        raise RequestError(f"{location} contains no weights that can be loaded safely: {_reason(error)}") from None
    if not named:
        raise RequestError(f"{location} contains no tensors")
    _refuse_odd_tensors(named, location)
    _refuse_expanded(named, os.path.getsize(path), location)
    return named


def refuse_wrong_dtypes(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], location: str) -> None:
    """Refuse weights that are not floating-point, and indices that are not integers.

    Args:
        expected: State dict of the model.
        found: State dict with the same names and shapes.
        location: URI that `found` came from, for messages.

    Raises:
        RequestError: A tensor has a wrong type. The message names the first one.
    """
    for name, tensor in found.items():
        is_float = expected[name].is_floating_point()
        is_right = (
            tensor.dtype in WEIGHT_DTYPES if is_float else not (tensor.is_floating_point() or tensor.is_complex())
        )
        if not is_right:
            wanted = "float32, float16, bfloat16 or float64" if is_float else "integers"
            raise RequestError(f"{name} in the weights {location} is {tensor.dtype}, but the model needs {wanted}")


def _reason(error: Exception) -> str:
    if isinstance(error, AttributeError):  # timm called a dict method on the content, or a string method on a key
        return "its content is not a dictionary from names to tensors"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _refuse_compressed(path: str, location: str) -> None:
    """Refuse compressed archives. torch never compresses, so its own archives cannot expand."""
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # not an archive, or a damaged one, which the loader reports
    if num_bytes > os.path.getsize(path):
        raise RequestError(f"{location} would expand to {num_bytes:,} bytes: save it uncompressed, with torch.save")


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
                raise RequestError(f"cannot use {location}: its tensor {name!r} is {kind}; save dense weights instead")


def _refuse_expanded(named: Mapping[str, torch.Tensor], file_bytes: int, location: str) -> None:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    if num_bytes > MAX_EXPANSION * file_bytes:
        raise RequestError(
            f"{location} has {file_bytes:,} bytes, but its tensors expand to {num_bytes:,} bytes, because some of them "
            "repeat a few values: save them with .contiguous()"
        )
