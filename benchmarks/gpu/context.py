"""Parameters, timers, weights and predictors of the sections of `benchmarks.gpu`."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = ("ecaresnet50d", "ecaresnet50d_pruned", "ecaresnetlight", "ecaresnet101d_pruned", "ecaresnet101d")
ROW_PREFIX = "ROW "
BATCH_SIZE, IMAGE_SIZE = 256, 224


@dataclass(frozen=True)
class Context:
    """Parameters of a section.

    Attributes:
        work: Folder of photographs and weights.
        on_cpu: True to run on the CPU, with few images.
    """

    work: Path
    on_cpu: bool

    @property
    def models(self) -> tuple[str, ...]:
        """Models to measure, the first one in all sections."""
        return ("test_resnet",) if self.on_cpu else MODELS

    @property
    def batch_size(self) -> int:
        """Number of images per forward pass."""
        return 8 if self.on_cpu else BATCH_SIZE

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return "cpu" if self.on_cpu else "cuda"

    @property
    def photographs(self) -> Path:
        """Folder of distinct photographs."""
        return self.work / "photographs"


def print_row(**cells: Any) -> None:
    """Print a row of results for the parent process."""
    print(ROW_PREFIX + json.dumps(cells), flush=True)


def seconds_per_call(work: Callable[[], object], context: Context, measured_s: float = 0.6) -> float:
    """Return the median time of a call, on a GPU by CUDA events."""
    import torch

    if context.on_cpu:
        work()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    until = time.monotonic() + measured_s
    while time.monotonic() < until or len(times) < 5:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return sorted(times)[len(times) // 2]


def images_per_s(work: Callable[[], object], num_images: int, context: Context, measured_s: float = 1.5) -> float:
    """Return the rate of a call by the wall clock, which includes the work of the host."""
    import torch

    work()
    started, done = time.perf_counter(), 0
    while done == 0 or (time.perf_counter() - started < measured_s and not context.on_cpu):
        work()
        done += num_images
    if not context.on_cpu:
        torch.cuda.synchronize()
    return done / (time.perf_counter() - started)


def spawned_processes() -> ProcessPoolExecutor:
    """Return a pool of processes that inherit nothing."""
    # A forked copy of a process that holds threads of torch, or a CUDA context, may hang.
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def weights_of(name: str, context: Context) -> str:
    """Return a file of random weights whose residual branches are not zero: products with zeros run faster."""
    import safetensors.torch
    import timm
    import torch

    path = context.work / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        module = timm.create_model(name)
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                torch.nn.init.constant_(layer.weight, 0.5)
        partial = path.with_suffix(f".{os.getpid()}")
        safetensors.torch.save_file(module.state_dict(), partial)
        partial.rename(path)
    return str(path)


def predictor_of(
    name: str, context: Context, dtype: str = "bfloat16", compile: bool = False, mode: str = "exact"
) -> Any:
    """Return a replica's predictor, without Ray."""
    from pipelines.config.sections import ModelConfig, OutputsConfig, PreprocessConfig
    from pipelines.engine.options import PredictOptions
    from pipelines.engine.predict import Predictor
    from pipelines.models.resolve import prepare_bundle, resolve_bundle
    from pipelines.outputs.columns import chosen_columns

    model = ModelConfig(name=name, weights=weights_of(name, context), dtype=dtype)
    preprocess = PreprocessConfig.model_validate({"mode": mode, "image_size": IMAGE_SIZE})
    options = PredictOptions(
        context.batch_size,
        chosen_columns(OutputsConfig()),
        use_gpu=not context.on_cpu,
        compile=compile and not context.on_cpu,
        max_pixels=preprocess.max_pixels_on_device,
    )
    return Predictor(prepare_bundle(resolve_bundle(model, preprocess)), options)


def eval_transform() -> Any:
    """Return timm's eval transform for ImageNet."""
    from pipelines.images.transform import EvalTransform

    return EvalTransform(
        (IMAGE_SIZE, IMAGE_SIZE), 0.875, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
