"""Forward pass on one core: timm in its default layout and channels-last, ecaray without and with Winograd, and int8.

    python -m benchmarks.forward [--models ecaresnet50d_pruned ...] [--rounds 4]

The variants take turns. The benchmark prints the best round of each, in milliseconds per image, and its time relative
to ecaray in float32. The weights are random. Each model is measured in a separate process, which keeps freed memory as
replicas do. int8, which includes normalization, is measured only on CPUs that support it.
"""

import argparse
import copy
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch

from pipelines.config.sections import ModelConfig, PreprocessConfig, QuantizationConfig
from pipelines.engine.plan import CPU_BATCH_SIZE
from pipelines.models.cpu import packing as convolutions
from pipelines.models.cpu.compiled import compile_program
from pipelines.models.cpu.int8 import quantize_bundle
from pipelines.models.prepare import prepare_for_inference
from pipelines.models.resolve import resolve_bundle
from pipelines.runtime.cpu import why_no_int8
from pipelines.runtime.malloc import KEEP_FREED_MEMORY

MODELS = ["ecaresnet50d_pruned", "ecaresnet50d", "ecaresnetlight", "ecaresnet101d_pruned", "ecaresnet101d"]
VARIANTS = ["timm", "timm, channels-last", "ecaray without Winograd", "ecaray"]
if why_no_int8() is None:
    VARIANTS.append("ecaray, int8")
OURS = VARIANTS.index("ecaray")


def main() -> None:
    """Measure one model after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    os.environ.update(KEEP_FREED_MEMORY)  # glibc reads them when a process starts
    print(f"{'':24}" + "".join(f"{variant:>26}" for variant in VARIANTS))
    for model in args.models:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            best = process.submit(measure, model, args.rounds).result()
        cells = [f"{1000 * seconds:.1f} ms, {seconds / best[OURS]:.2f}" for seconds in best]
        print(f"{model:24}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def measure(name: str, num_rounds: int) -> list[float]:
    """Return the seconds per image of each of `VARIANTS`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module: Any = timm.create_model(name).eval()
    images = torch.randn(CPU_BATCH_SIZE, *module.pretrained_cfg["input_size"])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    with mock.patch.object(convolutions, "load_library", return_value=None):
        without_winograd = _prepare_as_in_replica(module)
    variants: list[tuple[Callable[[torch.Tensor], object], torch.Tensor]] = [
        (copy.deepcopy(module), images),
        (copy.deepcopy(module).to(memory_format=torch.channels_last), channels_last),
        (without_winograd, channels_last),
        (_prepare_as_in_replica(module), channels_last),
    ]
    if why_no_int8() is None:
        variants.append(_compile_int8(name))
    best = [float("inf")] * len(variants)
    with torch.inference_mode():
        for _ in range(num_rounds + 1):  # the first round warms up
            for index, (forward, batch) in enumerate(variants):
                started = time.perf_counter()
                forward(batch)
                best[index] = min(best[index], (time.perf_counter() - started) / CPU_BATCH_SIZE)
    return best


def _prepare_as_in_replica(module: torch.nn.Module) -> torch.nn.Module:
    model = prepare_for_inference(copy.deepcopy(module)).to(memory_format=torch.channels_last)
    convolutions.pack_convolutions(model)
    return model


def _compile_int8(name: str) -> tuple[Callable[[torch.Tensor], object], torch.Tensor]:
    bundle = resolve_bundle(ModelConfig(name=name, weights="random", dtype="int8"), PreprocessConfig())
    shape = (CPU_BATCH_SIZE, *bundle.transform.input_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    quantized = quantize_bundle(bundle, noise, QuantizationConfig(min_agreement=0))
    assert isinstance(quantized.module, bytes)
    return compile_program(quantized.module, shape, num_threads=1), torch.from_numpy(noise)


if __name__ == "__main__":
    main()
