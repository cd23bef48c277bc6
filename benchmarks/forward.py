"""The forward pass in float32 on one core: timm as it comes and in channels-last, ecaray without and with Winograd.

    python -m benchmarks.forward [--models ecaresnet50d_pruned ...] [--rounds 4]

The ways take turns; prints the best round of each, in milliseconds an image, and how many times as fast ecaray is. The
weights are random. Each model is measured in a process of its own, which keeps freed memory as a replica does.
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

import timm
import torch

from pipelines.inference.plan import CPU_BATCH_SIZE
from pipelines.malloc import KEEP_FREED_MEMORY
from pipelines.models import convolutions
from pipelines.models.prepare import prepare_for_inference

MODELS = ["ecaresnet50d_pruned", "ecaresnet50d", "ecaresnetlight", "ecaresnet101d_pruned", "ecaresnet101d"]
WAYS = ["timm", "timm, channels-last", "ecaray without Winograd", "ecaray"]


def main() -> None:
    """Measure one model after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    os.environ.update(KEEP_FREED_MEMORY)  # read when a process starts
    print(f"{'':24}" + "".join(f"{way:>26}" for way in WAYS))
    for model in args.models:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            best = process.submit(measure, model, args.rounds).result()
        cells = [f"{1000 * seconds:.1f} ms, {seconds / best[-1]:.2f}" for seconds in best]
        print(f"{model:24}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def measure(name: str, num_rounds: int) -> list[float]:
    """Seconds an image, one for each of `WAYS`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module: Any = timm.create_model(name).eval()
    images = torch.randn(CPU_BATCH_SIZE, *module.pretrained_cfg["input_size"])
    in_channels_last = images.contiguous(memory_format=torch.channels_last)
    with mock.patch.object(convolutions, "load_library", return_value=None):
        without = _as_replicas_have_it(module)
    ways: list[tuple[Callable[[torch.Tensor], object], torch.Tensor]] = [
        (copy.deepcopy(module), images),
        (copy.deepcopy(module).to(memory_format=torch.channels_last), in_channels_last),
        (without, in_channels_last),
        (_as_replicas_have_it(module), in_channels_last),
    ]
    best = [float("inf")] * len(ways)
    with torch.inference_mode():
        for _ in range(num_rounds + 1):  # the first one warms up
            for index, (forward, batch) in enumerate(ways):
                started = time.perf_counter()
                forward(batch)
                best[index] = min(best[index], (time.perf_counter() - started) / CPU_BATCH_SIZE)
    return best


def _as_replicas_have_it(module: torch.nn.Module) -> torch.nn.Module:
    model = prepare_for_inference(copy.deepcopy(module)).to(memory_format=torch.channels_last)
    convolutions.pack_convolutions(model)
    return model


if __name__ == "__main__":
    main()
