"""Post-training static quantization to int8 for CPUs, with torchao's PT2E flow for x86.

https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_x86_inductor.html. Convolutions and, in most models, the
classifier compute in int8. The ranges of their inputs are calibrated on images of the job's own input.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from pipelines.config.sections import QuantizationConfig
from pipelines.errors import RequestError
from pipelines.models.bundle import ModelBundle
from pipelines.models.cpu.compiled import quiet_compiler
from pipelines.models.cpu.rounding import simplify_quantization
from pipelines.models.fingerprint import fingerprint
from pipelines.models.normalize import Normalizer
from pipelines.runtime.cache import cached

log = logging.getLogger(__name__)

BATCH_SIZE = 16
# Version of the cache key. Bump it when the exported program changes.
RECIPE = "torchao PT2E, default x86 config, from uint8, rounded once"


def quantize_bundle(bundle: ModelBundle, images: NDArray[np.uint8], config: QuantizationConfig) -> ModelBundle:
    """Return the bundle with an int8 program as its module, and its own fingerprint.

    Args:
        bundle: Bundle in float32.
        images: Images of the input, num_images x H x W x 3, uint8. One half calibrates and the other one measures the
            agreement with float32; a single image does both.
        config: Limit on the disagreement with float32.

    Raises:
        RequestError: The model disagrees with float32 too often, cannot be quantized, or has no classifier, or torchao
            is not installed.
    """
    if not bundle.num_classes:
        raise RequestError(
            "model.dtype = int8 needs a classifier to measure the agreement with float32, but the weights have none: "
            "use float32"
        )
    parts = {
        "float32": bundle.fingerprint,
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "min_agreement": config.min_agreement,
        "recipe": RECIPE,
        "torchao": _torchao_version(),
    }
    own_fingerprint = fingerprint(parts)
    # A resumed run has to use the program that it began with, because another quantization may differ in the last bit.
    try:
        path = cached(f"{own_fingerprint}.pt2", lambda path: _quantize_to(path, bundle, images, config.min_agreement))
    except OSError as error:
        advice = "set XDG_CACHE_HOME to a folder that only you can write to"
        raise RequestError(f"cannot cache the program of model.dtype = int8: {error}; {advice}") from None
    return replace(bundle, module=path.read_bytes(), fingerprint=own_fingerprint)


def _quantize_to(path: Path, bundle: ModelBundle, images: NDArray[np.uint8], min_agreement: float) -> None:
    assert isinstance(bundle.module, nn.Module)
    # Include the normalization, so that the compiled program converts uint8 to int8 without a float32 copy in memory.
    module = nn.Sequential(Normalizer(bundle.transform.mean, bundle.transform.std), bundle.module)
    batches = [torch.from_numpy(part) for part in _interleaved_batches(images)]
    middle = len(batches) // 2
    log.info("int8: quantizing %s with %d images of the input", bundle.name, len(images))
    with torch.no_grad(), quiet_compiler():
        try:
            quantized = _quantize(module, batches[:middle] or batches)
            simplify_quantization(quantized)
        except Exception as error:  # torch's export raises all kinds of errors, depending on the model
            reason = str(error).strip().partition("\n")[0]
            raise RequestError(f"{bundle.name} cannot be quantized: {type(error).__name__}: {reason}") from None
        agreement = _agreement(module, quantized, batches[middle:])
    num_compared = sum(map(len, batches[middle:]))
    log.info("int8: top-1 agrees with float32 on %.2f %% of %d images of the input", 100 * agreement, num_compared)
    if agreement < min_agreement:
        raise RequestError(
            f"{bundle.name} in int8 has the same top-1 as float32 on {agreement:.2%} of {num_compared} images of the "
            f"input, less than model.quantization.min_agreement = {min_agreement:.2%}: use float32, or lower the limit"
        )
    with torch.no_grad(), quiet_compiler():
        torch.export.save(_export(quantized, batches[0]), path)


def _torchao_version() -> str:
    try:
        return version("torchao")
    except PackageNotFoundError:
        raise RequestError("model.dtype = int8 needs torchao: pip install 'ecaray[int8]'") from None


def _interleaved_batches(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Return interleaved batches, so that similar images next to each other both calibrate and measure."""
    num_batches = max(2, -(-len(images) // BATCH_SIZE)) if len(images) > 1 else 1
    for first in range(num_batches):
        yield images[first::num_batches]


def _quantize(module: nn.Module, batches: list[torch.Tensor]) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    observed: Any = prepare_pt2e(_export(module, batches[0]).module(), quantizer)
    for batch in batches:
        observed(batch)
    quantized: fx.GraphModule = convert_pt2e(observed)
    return quantized


def _export(module: nn.Module, batch: torch.Tensor) -> torch.export.ExportedProgram:
    example = batch if len(batch) > 1 else batch.repeat(2, 1, 1, 1)  # torch.export treats a size of 1 as a constant
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _agreement(module: nn.Module, quantized: nn.Module, batches: list[torch.Tensor]) -> float:
    """Return the fraction of the images whose top-1 is the same."""
    same = [module(batch)[0].argmax(dim=1) == quantized(batch)[0].argmax(dim=1) for batch in batches]
    return float(torch.cat(same).float().mean())
