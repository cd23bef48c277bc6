"""Inference on a GPU: the forward pass, decoding, a replica, and the whole chain of `infer`."""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu.context import (
    IMAGE_SIZE,
    Context,
    eval_transform,
    images_per_s,
    predictor_of,
    print_row,
    seconds_per_call,
    spawned_processes,
    weights_of,
)


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

    with spawned_processes() as pool:
        list(pool.map(_decode_rate, [(str(context.photographs), "fast", 0.2)] * (os.cpu_count() or 1)))  # imports
        for mode in ("fast", "exact"):
            for num_processes in (1, 2) if context.on_cpu else (1, 4, 8, 12, 16):
                rates = pool.map(_decode_rate, [(str(context.photographs), mode, 1.0)] * num_processes)
                print_row(mode=mode, num_processes=num_processes, images_per_s=round(sum(rates)))
    accelerator = choose_accelerator(torch.device(context.device))
    decode = DeviceDecoder(eval_transform(), 10**9, accelerator)
    files = [path.read_bytes() for path in sorted(context.photographs.iterdir())[:1024]]
    for batch_size in (16,) if context.on_cpu else (64, 256, 1024):
        batch = files[:batch_size]
        for title, work in (("decode", decode._decode), ("decode, resize, crop", decode)):
            rate = images_per_s(functools.partial(work, batch), len(batch), context)
            print_row(device=title, batch_size=batch_size, images_per_s=round(rate))


def _decode_rate(job: tuple[str, Any, float]) -> float:
    import numpy as np

    from pipelines.engine.fetch_decode import FetchAndDecode
    from pipelines.images.preprocess import make_preprocess

    folder, mode, measured_s = job
    transform = eval_transform()
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
            block = FetchAndDecode(eval_transform(), 10**9, 10**9, mode)(rows)
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
