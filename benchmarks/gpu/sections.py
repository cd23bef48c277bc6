"""Measurements of `benchmarks.gpu`, each of which runs in a process of its own and prints its rows as JSON.

python -m benchmarks.gpu.sections SECTION WORK_FOLDER [--cpu]
"""

import argparse
import concurrent.futures
import ctypes
import functools
import importlib.metadata
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

MODELS = ("ecaresnet50d", "ecaresnet50d_pruned", "ecaresnetlight", "ecaresnet101d_pruned", "ecaresnet101d")
ROW_PREFIX = "ROW "
BATCH_SIZE, IMAGE_SIZE = 256, 224
PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow")
# Numbers of nvjpegBackend_t, and of the status "this GPU has no such engine".
NVJPEG_BACKENDS = {"hardware": 3, "default": 0}


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


def describe_machine(context: Context) -> None:
    """Print device, driver, versions, and the rates of matrix products and copies."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    shm = os.statvfs("/dev/shm")
    print_row(gpu=_output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    print_row(
        cpu=re.findall(r"Model name:\s*(.*)", _output_of("lscpu")),
        num_cpus=len(os.sched_getaffinity(0)),
        shm_gb=round(shm.f_blocks * shm.f_frsize / 1e9, 1),
    )
    print_row(python=sys.version.split()[0], **{name: importlib.metadata.version(name) for name in PACKAGES})
    if not context.on_cpu:
        _describe_gpu(context)


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError as error:
        return repr(error)


def _describe_gpu(context: Context) -> None:
    import torch
    import torchvision

    libraries = Path(torchvision.__file__).parents[1] / "torchvision.libs"
    nvjpeg = ctypes.CDLL(str(next(libraries.glob("libnvjpeg*"))))
    torch.zeros(1, device="cuda")
    for name, number in NVJPEG_BACKENDS.items():
        handle = ctypes.c_void_p()
        status = nvjpeg.nvjpegCreateEx(number, None, None, 0, ctypes.byref(handle))
        print_row(nvjpeg_backend=name, is_available=status == 0)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    memory = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    host = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    product_s = seconds_per_call(lambda: left @ right, context)
    copy_s = seconds_per_call(lambda: memory[: 2**31].copy_(memory[2**31 :]), context)
    upload_s = seconds_per_call(lambda: memory[: 2**28].copy_(host, non_blocking=True), context)
    print_row(
        bfloat16_tflops=round(2 * 8192**3 / product_s / 1e12),
        copy_tb_per_s=round(2 * 2**31 / copy_s / 1e12, 2),
        upload_gb_per_s=round(2**28 / upload_s / 1e9, 1),
    )


def write_photographs(context: Context) -> None:
    """Write distinct photographs, and many links to them, so that the page cache holds each one once."""
    num_images, num_links = (64, 4) if context.on_cpu else (2048, 100)
    num_processes = os.cpu_count() or 1
    context.photographs.mkdir(parents=True, exist_ok=True)
    count = -(-num_images // num_processes)
    with _spawned_processes() as pool:
        list(pool.map(_write_some, [(str(context.photographs), seed, count) for seed in range(num_processes)]))
    paths = sorted(context.photographs.iterdir())
    for number in range(num_links):
        _link_all(paths, context.work / "many" / f"{number:03d}")
    for number in range(4):  # four classes, each with a quarter of the photographs, four times
        for copy in range(4):
            _link_all(paths[number::4], context.work / "classes" / str(number) / str(copy))
    mean_kb = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    print_row(num_photographs=len(paths), num_links=len(paths) * num_links, mean_kb=round(mean_kb, 1))


def _spawned_processes() -> concurrent.futures.ProcessPoolExecutor:
    # A forked copy of a process that holds threads of torch, or a CUDA context, may hang.
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def _write_some(job: tuple[str, int, int]) -> None:
    from cluster.local.photographs import crops, encode

    folder, seed, count = job
    for name, image in crops(count, seed=seed):
        Path(folder, f"{seed}-{name}.jpg").write_bytes(encode(image, quality=92))


def _link_all(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)


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


def run_tests(context: Context) -> None:
    """Run the tests that need a GPU. With `--cpu`, only collect them."""
    files = ["tests/engine/test_gpu.py", "tests/training/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run([*command, *(["--collect-only"] if context.on_cpu else [])], capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        print_row(test=line[:200])
    print_row(tests=done.stdout.strip().splitlines()[-1])
    done.check_returncode()


def measure_forward(context: Context) -> None:
    """Measure the forward pass alone, from uint8 on the device to logits, in several layouts and precisions."""
    for name in context.models:
        for way in ("channels-last", "contiguous", "cudnn.benchmark", "float16", "compiled", "CUDA graph"):
            try:
                print_row(model=name, way=way, images_per_s=round(_forward_rate(name, way, context)))
            except Exception as error:  # one way that fails costs no other
                print_row(model=name, way=way, error=repr(error)[:200])


def _forward_rate(name: str, way: str, context: Context) -> float:
    import torch

    import pipelines.engine.predict as module

    layout = torch.contiguous_format if way == "contiguous" else torch.channels_last
    torch.backends.cudnn.benchmark = way == "cudnn.benchmark"
    with mock.patch.object(module, "memory_format_for", return_value=layout):
        dtype = "float16" if way == "float16" else "bfloat16"
        predictor = predictor_of(name, context, dtype, compile=way == "compiled")
    images = torch.randint(
        0, 256, (context.batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=predictor.device
    )
    with torch.inference_mode():
        work: Callable[[], object] = functools.partial(predictor.forward, images)
        work()
        if way == "CUDA graph" and not context.on_cpu:
            work = _captured(work)
        return len(images) / seconds_per_call(work, context)


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure_decode(context: Context) -> None:
    """Measure decoding alone: in processes on CPUs, and in batches on the device."""
    import torch

    from pipelines.images.device import DeviceDecoder
    from pipelines.models.accelerators import choose_accelerator

    with _spawned_processes() as pool:
        list(pool.map(_decode_rate, [(str(context.photographs), "fast", 0.2)] * (os.cpu_count() or 1)))  # imports
        for mode in ("fast", "exact"):
            for num_processes in (1, 2) if context.on_cpu else (1, 4, 8, 12, 16):
                rates = pool.map(_decode_rate, [(str(context.photographs), mode, 1.0)] * num_processes)
                print_row(mode=mode, num_processes=num_processes, images_per_s=round(sum(rates)))
    accelerator = choose_accelerator(torch.device(context.device))
    decode = DeviceDecoder(_transform(), 10**9, accelerator)
    files = [path.read_bytes() for path in sorted(context.photographs.iterdir())[:1024]]
    for batch_size in (16,) if context.on_cpu else (64, 256, 1024):
        batch = files[:batch_size]
        for title, work in (("decode", decode._decode), ("decode, resize, crop", decode)):
            rate = images_per_s(functools.partial(work, batch), len(batch), context)
            print_row(device=title, batch_size=batch_size, images_per_s=round(rate))


def _transform() -> Any:
    from pipelines.images.transform import EvalTransform

    return EvalTransform(
        (IMAGE_SIZE, IMAGE_SIZE), 0.875, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )


def _decode_rate(job: tuple[str, Any, float]) -> float:
    import numpy as np

    from pipelines.engine.fetch_decode import FetchAndDecode
    from pipelines.images.preprocess import make_preprocess

    folder, mode, measured_s = job
    transform = _transform()
    stage = FetchAndDecode(transform, 10**9, 10**9, mode)
    preprocess, pixels = make_preprocess(mode, transform, 10**9), np.empty((*transform.input_size, 3), np.uint8)
    files = [path.read_bytes() for path in sorted(Path(folder).iterdir())[:64]]
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < measured_s:
        for content in files:
            stage.decode_row(content, preprocess, pixels)
        done += len(files)
    return done / (time.perf_counter() - started)


def measure_replica(context: Context) -> None:
    """Measure a replica without Ray: Arrow blocks in memory to tables of predictions, in threads as Ray calls it."""
    import pyarrow as pa

    from pipelines.engine.fetch_decode import FetchAndDecode

    paths = [str(path) for path in sorted(context.photographs.iterdir())[: context.batch_size]]
    rows = pa.table({"id": pa.array(range(len(paths)), pa.int64()), "uri": paths})
    for mode in ("fast", "cuda"):
        for compile in (False, True):
            predictor = predictor_of(context.models[0], context, compile=compile, mode=mode)
            block = FetchAndDecode(_transform(), 10**9, 10**9, mode)(rows)
            for num_threads in (1, 2, 3):
                num_calls = 4 if context.on_cpu else 60
                with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
                    list(pool.map(predictor, [block] * num_threads))
                    started, cpu_started = time.perf_counter(), time.process_time()
                    list(pool.map(predictor, [block] * num_calls))
                    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
                num_images = num_calls * len(paths)
                print_row(
                    mode=mode,
                    compiled=compile,
                    num_threads=num_threads,
                    images_per_s=round(num_images / elapsed_s),
                    cpu_ms_per_image=round(1000 * cpu_s / num_images, 4),
                )


def measure_whole(context: Context, mode: str, compile: bool = False) -> None:
    """Measure the whole chain of `infer` over many files: JPEG bytes to Parquet."""
    import pyarrow as pa

    from pipelines.benchmark.setup import Setup
    from pipelines.benchmark.whole import measure_whole as measure
    from pipelines.config.benchmark import BenchmarkConfig
    from pipelines.engine.engine import Engine
    from pipelines.inference.request import file_metadata, resolve_outputs
    from pipelines.inputs.files import FilesReader
    from pipelines.inputs.listing import list_objects
    from pipelines.models.process import ModelProcess
    from pipelines.outputs.columns import chosen_columns
    from pipelines.outputs.schema import parts_schema
    from pipelines.outputs.writer import PartWriter
    from pipelines.runtime.ray_session import ray_session

    output = context.work / "rows" / f"{mode}-{compile}"
    output.mkdir(parents=True, exist_ok=True)
    model = {"name": context.models[0], "weights": weights_of(context.models[0], context), "dtype": "bfloat16"}
    config = BenchmarkConfig.model_validate(
        {
            "input": {"uri": str(context.work / "many")},
            "output": {"uri": str(output)},
            "model": model | {"compile": compile and not context.on_cpu},
            "preprocess": {"mode": "fast" if context.on_cpu and mode == "cuda" else mode, "image_size": IMAGE_SIZE},
            "compute": {"use_gpu": not context.on_cpu},
        }
    )
    sample = list_objects(config.input.uri, []).table.select(["uri"])
    sample = sample.slice(0, 60_000 if mode == "exact" else None).combine_chunks()
    with ModelProcess(config.model, config.preprocess) as process:
        engine = Engine(config, process)
        columns = chosen_columns(resolve_outputs(config, engine.facts))
        writer = PartWriter(str(output), parts_schema(columns, engine.facts), file_metadata(engine.facts))
        with ray_session():
            setup = Setup(config, engine, os.cpu_count() or 1, FilesReader(), pa.table(sample), writer)
            rate = measure(setup)
    print_row(
        mode=config.preprocess.mode,
        compiled=config.model.compile,
        num_images=sample.num_rows,
        steady_images_per_s=rate.steady_images_per_s and round(rate.steady_images_per_s),
        first_file_s=round(rate.first_file_s, 1),
        elapsed_s=round(rate.elapsed_s, 1),
        num_failed=rate.num_failed,
        rows_per_task=setup.tasks.num_rows,
    )


def measure_training_steps(context: Context) -> None:
    """Measure training steps on one batch in memory."""
    from benchmarks.ingest import train_from_memory

    batch_size = context.batch_size
    for name in context.models[:2]:
        for compile in (False, True):
            rate = train_from_memory(_training_request(context, name, compile and not context.on_cpu), IMAGE_SIZE)
            print_row(model=name, compiled=compile, batch_size=batch_size, images_per_s=round(rate))


def measure_training(context: Context) -> None:
    """Measure `jobs.train` on photographs, to compare it with steps on a batch in memory."""
    from benchmarks.ingest import train

    request = _training_request(context, context.models[0], compile=False)
    request["output"] = {"uri": str(context.work / "rows" / "trained")}
    (context.work / "rows").mkdir(exist_ok=True)
    print_row(model=context.models[0], batch_size=context.batch_size, images_per_s=round(train(request)))


def _training_request(context: Context, name: str, compile: bool) -> dict[str, Any]:
    return {
        "data": {"train": {"uri": str(context.work / "classes")}},
        "output": {"uri": str(context.work / "unused")},
        "model": {"name": name, "weights": "random", "dtype": "bfloat16", "compile": compile},
        "preprocess": {"image_size": IMAGE_SIZE},
        "optim": {"epochs": 2, "global_batch_size": context.batch_size, "lr": 0.05},
        "scaling": {"use_gpu": not context.on_cpu},
    }


@dataclass(frozen=True)
class Section:
    """Measurement with its time limit on a GPU.

    Attributes:
        measure: Function that prints the rows.
        limit_s: Seconds after which it is killed.
    """

    measure: Callable[[Context], None]
    limit_s: float


# In the order of their worth.
SECTIONS = {
    "machine": Section(describe_machine, 40),
    "photographs": Section(write_photographs, 40),
    "tests": Section(run_tests, 150),
    "forward": Section(measure_forward, 90),
    "whole-fast": Section(functools.partial(measure_whole, mode="fast"), 60),
    "whole-cuda": Section(functools.partial(measure_whole, mode="cuda"), 60),
    "decode": Section(measure_decode, 40),
    "replica": Section(measure_replica, 50),
    "training-steps": Section(measure_training_steps, 100),
    "whole-fast-compiled": Section(functools.partial(measure_whole, mode="fast", compile=True), 75),
    "training": Section(measure_training, 90),
    "whole-exact": Section(functools.partial(measure_whole, mode="exact"), 60),
}


def main() -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("work", type=Path)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    SECTIONS[args.section].measure(Context(args.work, args.cpu))


if __name__ == "__main__":
    main()
