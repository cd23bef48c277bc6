"""Measurements of single stages in one process: the CPU time per image, and the rate of the stage.

Ray is not needed here: `pipelines.benchmark.run` runs the measurements in workers. Each of them discards a warm-up.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.options import PredictOptions
from pipelines.engine.quantization_sample import evenly_spaced
from pipelines.engine.schema import IMAGES
from pipelines.errors import RunError
from pipelines.images.jpeg import size_for_device
from pipelines.images.preprocess import make_preprocess
from pipelines.models.bundle import ModelBundle
from pipelines.outputs.writer import PartWriter

Item = TypeVar("Item")

# Number of requests that a fetch task of a run has in flight.
FETCH_ROWS = 64


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage.

    Attributes:
        images_per_s: Rate of one process, in wall time.
        cpu_s_per_image: CPU time per image, in seconds.
        bytes_per_image: Bytes read per image; 0 for stages that do not read from the store.
    """

    images_per_s: float
    cpu_s_per_image: float
    bytes_per_image: float = 0.0


def measure_fetch(rows: pa.Table, decode: FetchAndDecode, stage_s: float) -> StageCost:
    """Measure reading whole objects, with as many requests in flight as in a run.

    Args:
        rows: Rows of the input. They are read again until the time is up.
        decode: Fetch and decode stage of the run.
        stage_s: Duration of the measurement in seconds.
    """
    num_bytes = 0

    def fetch(part: pa.Table) -> int:
        nonlocal num_bytes
        fetched = [one.content for one in decode.reader.read(part, decode.max_bytes)]
        contents = [content for content in fetched if isinstance(content, bytes)]
        num_bytes += sum(map(len, contents))
        return len(contents)

    parts = [rows.slice(start, FETCH_ROWS) for start in range(0, rows.num_rows, FETCH_ROWS)]
    fetch(parts[0])
    num_bytes = 0
    cost, num_images = _time(fetch, itertools.cycle(parts), stage_s)
    return StageCost(cost.images_per_s, cost.cpu_s_per_image, num_bytes / num_images)


def measure_decode(rows: pa.Table, decode: FetchAndDecode, stage_s: float) -> StageCost:
    """Measure decoding from memory on one core, to images of the model's input size or to JPEGs for GPUs.

    Raises:
        RunError: None of the images can be fetched and decoded.
    """
    contents = _fetch_some(rows, FETCH_ROWS, decode)
    preprocess = make_preprocess(decode.mode, decode.transform, decode.max_pixels)
    pixels = np.empty((*decode.transform.input_size, 3), np.uint8)
    images = [content for content in contents if "error_kind" not in decode.decode_row(content, preprocess, pixels)]
    if not images:
        raise RunError("not one of the sampled images could be fetched and decoded")

    def decode_one(content: bytes) -> int:
        decode.decode_row(content, preprocess, pixels)
        return 1

    return _time(decode_one, itertools.cycle(images), stage_s)[0]


def measure_device_decode(
    rows: pa.Table, decode: FetchAndDecode, options: PredictOptions, stage_s: float
) -> StageCost | None:
    """Measure decoding a batch of JPEGs from host memory to the model's input, on the device of a replica.

    Returns:
        Mean cost over all images of the batch, including those that CPUs decode; None if CPUs decode all of them.

    Raises:
        RunError: The device cannot decode JPEGs.
    """
    from pipelines.engine.pixels import group_by_pixels
    from pipelines.images.device import DeviceDecoder
    from pipelines.models.accelerators import replica_accelerator

    contents = _fetch_some(rows, options.batch_size, decode)
    sizes = [size_for_device(content, decode.transform, decode.max_pixels) for content in contents]
    jpegs = [(content, size.width * size.height) for content, size in zip(contents, sizes) if size]
    if not jpegs:
        return None
    groups = [[jpegs[position][0] for position in group] for group in group_by_pixels(np.array([n for _, n in jpegs]))]
    accelerator = replica_accelerator(options.use_gpu)
    decode_group = DeviceDecoder(decode.transform, decode.max_pixels, accelerator)

    def decode_all(_: None) -> int:
        for group in groups:
            decode_group(group)
        accelerator.synchronize()
        return len(contents)

    decode_all(None)
    return _time(decode_all, itertools.repeat(None), stage_s)[0]


def _fetch_some(rows: pa.Table, num_images: int, decode: FetchAndDecode) -> list[bytes]:
    some = rows.take(evenly_spaced(rows.num_rows, num_images))
    return [found.content for found in decode.reader.read(some, decode.max_bytes) if isinstance(found.content, bytes)]


def measure_forward(bundle: ModelBundle, options: PredictOptions, num_threads: int, stage_s: float) -> StageCost:
    """Measure one replica on images of noise, from uint8 to rows, with `num_threads` batches at a time."""
    from pipelines.engine.predict import Predictor  # late: torch

    predict = Predictor(bundle, options)
    batch = _noise_images(options.batch_size, bundle.transform.input_size)

    with ThreadPoolExecutor(num_threads) as threads:
        predicted = _run_continuously(lambda: threads.submit(predict, batch), num_threads)
        for _ in range(2 * num_threads):
            next(predicted)
        return _time(len, predicted, stage_s)[0]


def _run_continuously(submit: Callable[[], Future[Item]], num_in_flight: int) -> Iterator[Item]:
    """Keep `num_in_flight` calls running, and yield their results as they complete.

    As in a run, no thread waits for another one before its next batch. In lockstep, all of them would compete for the
    memory bandwidth at the same moment.
    """
    completed: SimpleQueue[Future[Item]] = SimpleQueue()
    for _ in range(num_in_flight):
        submit().add_done_callback(completed.put)
    while True:
        done = completed.get()
        submit().add_done_callback(completed.put)
        yield done.result()


def measure_write(writer: PartWriter, num_rows: int, stage_s: float) -> StageCost:
    """Measure writing a Parquet file of `num_rows` rows to the store, again and again."""
    rows = _random_predictions(writer.parts_schema, num_rows)

    def write(_: None) -> int:
        writer(rows)
        return num_rows

    write(None)
    return _time(write, itertools.repeat(None), stage_s)[0]


def _time(work: Callable[[Item], int], items: Iterator[Item], stage_s: float) -> tuple[StageCost, int]:
    """Call `work` on items until the time is up, at least once.

    Args:
        work: Function that processes an item and returns its number of images.
        items: Endless supply of items.
        stage_s: Duration of the measurement in seconds.

    Returns:
        Cost per image, and the number of images.

    Raises:
        RunError: No item had an image.
    """
    num_images = 0
    cpu_before, before = time.process_time(), time.monotonic()
    for item in items:
        num_images += work(item)
        elapsed = time.monotonic() - before
        if elapsed >= stage_s:
            break
    if not num_images:
        raise RunError("not one of the sampled images could be read")
    return StageCost(num_images / elapsed, (time.process_time() - cpu_before) / num_images), num_images


def _noise_images(num_images: int, input_size: tuple[int, int]) -> pa.Table:
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, *input_size, 3), np.uint8)
    columns = {
        "id": pa.array(range(num_images), pa.int64()),
        "uri": pa.array([""] * num_images),
        "width": pa.array([input_size[1]] * num_images, pa.int32()),
        "height": pa.array([input_size[0]] * num_images, pa.int32()),
        "image": pa.array([image.tobytes() for image in pixels], pa.large_binary()),
    }
    empty_names = ("jpeg", "error_kind", "error_message", "is_clipped")
    empty = {name: pa.nulls(num_images, IMAGES.field(name).type) for name in empty_names}
    columns |= empty | {"num_retries": pa.array([0] * num_images, pa.int32())}
    return pa.table(columns, schema=IMAGES)


def _random_predictions(schema: pa.Schema, num_rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    columns: dict[str, pa.Array] = {}
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            values = rng.standard_normal(num_rows * field.type.list_size, np.float32)
            columns[field.name] = pa.FixedSizeListArray.from_arrays(values, field.type.list_size)
        else:
            value = {"label": ["a label"] * 5, "prob": [0.2] * 5, "index": [1] * 5, "uri": "s3://bucket/key.jpg"}
            columns[field.name] = pa.array([value.get(field.name, 1)] * num_rows, field.type)
    columns |= {name: pa.nulls(num_rows, pa.string()) for name in ("error_kind", "error_message")}
    return pa.table(columns | {"num_retries": pa.array([0] * num_rows, pa.int32())})
