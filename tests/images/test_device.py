"""`preprocess.mode=cuda` on a CPU device, which runs the same steps through the same calls."""

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
import torch
from PIL import Image

from cluster.local.photographs import encode
from cluster.local.photographs import photographs as sources
from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.engine import pixels
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.options import PredictOptions
from pipelines.engine.predict import Predictor
from pipelines.errors import ItemError, RunError
from pipelines.images import device
from pipelines.images.decode import decode_rgb
from pipelines.images.device import DeviceDecoder
from pipelines.images.jpeg import MAX_DEVICE_BYTES, MAX_DEVICE_PIXELS, Coding, coding_of, read_size, size_for_device
from pipelines.images.preprocess import Mode
from pipelines.images.transform import EvalTransform
from pipelines.models.accelerators import Accelerator
from pipelines.models.bundle import ModelBundle
from pipelines.models.resolve import prepare_bundle, resolve_bundle
from tests.images.test_fast import IMAGENET
from tests.support.embeddings import cosines
from tests.support.schemas import columns_of

MAX_PIXELS = 10**8
CPU = Accelerator(torch.device("cpu"))


@pytest.fixture(scope="module")
def bundle(telling_weights: Callable[[str], Path]) -> ModelBundle:
    weights = str(telling_weights("test_resnet"))
    return prepare_bundle(resolve_bundle(ModelConfig(name="test_resnet", weights=weights), PreprocessConfig()))


@pytest.fixture(scope="module")
def files(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Photographs of all kinds, a missing file, and a JPEG with garbage in the middle."""
    torn = tmp_path_factory.mktemp("torn") / "torn.jpg"
    content = encode(sources()["coffee"])
    torn.write_bytes(content[:3] + b"\xff\xd8\xff\xc0" * 40 + content[-2:])
    paths = [*map(str, sorted(photographs.iterdir())), "/absent.jpg", str(torn)]
    return pa.table({"id": pa.array(range(100, 100 + len(paths)), pa.int64()), "uri": paths})


def decode(files: pa.Table, bundle: ModelBundle, mode: Mode) -> pa.Table:
    return FetchAndDecode(bundle.transform, 10**8, MAX_PIXELS, mode)(files)


def replica(bundle: ModelBundle, max_pixels: int | None) -> Predictor:
    return Predictor(bundle, PredictOptions(8, columns_of(5, True), use_gpu=False, max_pixels=max_pixels))


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (1000, 800), (224, 300), (256, 256)])
def test_pixels_are_close_to_the_exact_transform(size: tuple[int, int]) -> None:
    image = sources()["coffee"].resize(size)
    content = encode(image, quality=92)
    assert size_for_device(content, IMAGENET, MAX_PIXELS) == size
    (found,) = DeviceDecoder(IMAGENET, MAX_PIXELS, CPU)([content])
    assert isinstance(found, torch.Tensor)
    exact = IMAGENET.apply(decode_rgb(content, MAX_PIXELS), MAX_PIXELS)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (224, 224, 3))
    assert np.abs(found.numpy().astype(int) - exact).mean() < 0.6


def test_files_that_a_gpu_would_decode_wrongly_stay_on_the_cpu() -> None:
    coffee = sources()["coffee"]
    content = encode(coffee)
    small = encode(coffee.resize((90, 41)))
    assert size_for_device(content, IMAGENET, MAX_PIXELS) == coffee.size
    assert size_for_device(content + b"\0\0", IMAGENET, MAX_PIXELS) == coffee.size
    assert size_for_device(content[:-20], IMAGENET, MAX_PIXELS) is None  # torn
    assert size_for_device(b"GIF89a\xff\xd9", IMAGENET, MAX_PIXELS) is None
    assert size_for_device(content, IMAGENET, 1000) is None
    assert (
        size_for_device(small, EvalTransform((224, 224), 1.0, "border", "bicubic", (0,) * 3, (1,) * 3), 10**8) is None
    )
    assert coffee.width * coffee.height < MAX_DEVICE_PIXELS


def test_color_spaces_that_a_gpu_misreads_stay_on_the_cpu() -> None:
    coffee = sources()["coffee"]
    for image in (coffee, coffee.convert("L")):
        assert size_for_device(encode(image), IMAGENET, MAX_PIXELS) == coffee.size
    file = io.BytesIO()
    coffee.save(file, "jpeg", keep_rgb=True)
    assert read_size(file.getvalue(), MAX_PIXELS) == coffee.size
    assert size_for_device(file.getvalue(), IMAGENET, MAX_PIXELS) is None


def test_large_files_stay_on_the_cpu() -> None:
    content = encode(sources()["coffee"])
    comment = b"\xff\xfe\xff\xff" + bytes(0xFFFF - 2)
    large = content[:2] + comment * (MAX_DEVICE_BYTES // len(comment) + 1) + content[2:]
    assert read_size(large, MAX_PIXELS) == sources()["coffee"].size
    assert size_for_device(large, IMAGENET, MAX_PIXELS) is None


def test_replicas_that_decode_return_nearly_the_same_rows(bundle: ModelBundle, files: pa.Table) -> None:
    encoded = decode(files, bundle, "cuda")
    is_jpeg = encoded["jpeg"].is_valid().to_numpy()
    assert is_jpeg.any()
    assert not (is_jpeg & encoded["image"].is_valid().to_numpy()).any()
    found, exact = replica(bundle, MAX_PIXELS)(encoded), replica(bundle, None)(decode(files, bundle, "exact"))
    assert found.schema.equals(exact.schema)
    for name in ("id", "uri", "width", "height", "error_kind"):
        assert found[name].to_pylist() == exact[name].to_pylist(), name
    assert np.median(cosines(found, exact)) > 0.999


def test_large_images_are_decoded_in_small_groups(
    bundle: ModelBundle, files: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = decode(files, bundle, "cuda")
    expected = replica(bundle, MAX_PIXELS)(encoded)
    monkeypatch.setattr(pixels, "MAX_PIXELS_PER_DECODE", 300_000)
    assert replica(bundle, MAX_PIXELS)(encoded).equals(expected)


def test_threads_of_a_replica_decode_one_at_a_time(
    bundle: ModelBundle, files: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, predict = decode(files, bundle, "cuda"), replica(bundle, MAX_PIXELS)
    expected = predict(encoded)
    decode_jpeg, busy = getattr(device, "decode_jpeg"), threading.Lock()  # noqa: B009 - not a public name of the module

    def decode_alone(contents: list[torch.Tensor], **kwargs: object) -> list[torch.Tensor]:
        assert busy.acquire(blocking=False), "two threads decode at the same time"
        time.sleep(0.05)
        found: list[torch.Tensor] = decode_jpeg(contents, **kwargs)
        busy.release()
        return found

    monkeypatch.setattr(device, "decode_jpeg", decode_alone)
    with ThreadPoolExecutor(2) as threads:
        assert all(rows.equals(expected) for rows in threads.map(predict, [encoded] * 4))


def test_out_of_memory_is_retried(bundle: ModelBundle, files: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = decode(files.slice(0, len(files) - 1), bundle, "cuda")
    expected = replica(bundle, MAX_PIXELS)(encoded)
    predict = replica(bundle, MAX_PIXELS)
    decode_jpeg, stack = getattr(device, "decode_jpeg"), torch.stack  # noqa: B009 - not a public name of the module
    num_stacked, num_emptied = 0, 0

    def fail_until_cache_is_emptied(contents: list[torch.Tensor], **kwargs: object) -> list[torch.Tensor]:
        if not num_emptied:
            raise RuntimeError("Error while decoding JPEG images: CUDA out of memory")
        found: list[torch.Tensor] = decode_jpeg(contents, **kwargs)
        return found

    def empty_cache() -> None:
        nonlocal num_emptied
        num_emptied += 1

    def never(*_: object) -> None:
        raise AssertionError("a CPU decoded a file that the GPU accepts")

    def fail_once(tensors: list[torch.Tensor]) -> torch.Tensor:
        nonlocal num_stacked
        num_stacked += 1
        if num_stacked == 1:
            raise torch.cuda.OutOfMemoryError
        return stack(tensors)

    monkeypatch.setattr(device, "decode_jpeg", fail_until_cache_is_emptied)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(Accelerator, "release_cached_memory", lambda self: empty_cache())
    monkeypatch.setattr(device.DeviceDecoder, "_decode_on_cpu", never)
    monkeypatch.setattr(torch, "stack", fail_once)
    assert predict(encoded).equals(expected)
    assert (num_stacked, num_emptied) == (2, 2)


def reject_batches(is_rejected: Callable[[bytes], bool], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the device reject batches with certain files, and return the list of the sizes of all batches."""
    decode_jpeg, calls = getattr(device, "decode_jpeg"), []  # noqa: B009 - not a public name of the module

    def decode(encoded: list[torch.Tensor], **kwargs: object) -> list[torch.Tensor]:
        calls.append(len(encoded))
        if any(is_rejected(one.numpy().tobytes()) for one in encoded):
            raise RuntimeError("nvJPEG rejects a file")
        found: list[torch.Tensor] = decode_jpeg(encoded, **kwargs)
        return found

    monkeypatch.setattr(device, "decode_jpeg", decode)
    return calls


def test_file_that_the_device_rejects_is_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encode(source.convert("RGB")) for source in list(sources().values())[:5]]
    decoder = DeviceDecoder(IMAGENET, MAX_PIXELS, CPU)
    expected = decoder(contents)
    calls = reject_batches(lambda content: content == contents[2], monkeypatch)
    found = decoder(contents)
    assert calls == [5, 2, 3, 1, 1, 2]  # the rejected file is retried once
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        assert np.abs(ours.numpy().astype(int) - theirs.numpy()).mean() < 1
    (torn,) = decoder([contents[2][:3]])
    assert isinstance(torn, ItemError)


def encoded_as(coding: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8)
    if coding == "progressive":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", progressive=True)
        return buffer.getvalue()
    return bytes(simplejpeg.encode_jpeg(pixels, colorsubsampling=coding))


def test_coding_is_read_from_the_headers() -> None:
    assert coding_of(encoded_as("420", 0)) == Coding(0xC0, 8, b"\x22\x11\x11", False, False)
    assert coding_of(encoded_as("422", 0)).sampling == b"\x21\x11\x11"
    assert coding_of(encoded_as("progressive", 0)).frame == 0xC2
    pixels = Image.fromarray(np.zeros((64, 64), np.uint8))
    buffers = [io.BytesIO() for _ in range(3)]
    pixels.save(buffers[0], "JPEG")
    pixels.save(buffers[1], "JPEG", restart_marker_blocks=1)
    pixels.convert("CMYK").save(buffers[2], "JPEG")
    grey, with_restarts, cmyk = (coding_of(buffer.getvalue()) for buffer in buffers)
    assert grey == Coding(0xC0, 8, b"\x11", False, False)
    assert with_restarts == grey._replace(has_restarts=True)
    assert (len(cmyk.sampling), cmyk.has_adobe_marker) == (4, True)
    assert coding_of(b"no image") == coding_of(b"") == Coding(0, 0, b"", False, False)


@pytest.mark.parametrize("percent", [0.4, 1, 3])
def test_unsupported_codings_cost_only_themselves(percent: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device rejects 4:1:1 and progressive files, and with them the whole batch."""
    decoder = DeviceDecoder(IMAGENET, MAX_PIXELS, CPU)
    files = {coding: encoded_as(coding, seed=0) for coding in ("420", "444", "422", "411", "progressive")}
    rejected = {coding_of(files["411"]), coding_of(files["progressive"])}
    calls = reject_batches(lambda content: coding_of(content) in rejected, monkeypatch)
    rng, num_batches, batch_size = np.random.default_rng(0), 8, 64
    kinds = np.where(rng.random((num_batches, batch_size)) < percent / 100, "rejected", "420").astype(object)
    kinds[kinds == "420"] = rng.choice(["420", "444", "422"], (kinds == "420").sum())
    kinds[kinds == "rejected"] = rng.choice(["411", "progressive"], (kinds == "rejected").sum())
    for batch in kinds:
        assert all(isinstance(found, torch.Tensor) for found in decoder([files[str(kind)] for kind in batch]))
    assert sum(calls) <= 1.1 * kinds.size


def test_coding_with_a_damaged_first_file_stays_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DeviceDecoder(IMAGENET, MAX_PIXELS, CPU)
    contents = [encoded_as("444", seed) for seed in range(3)]
    calls = reject_batches(lambda content: content == contents[0], monkeypatch)
    decoder(contents)
    assert calls == [1, 1, 1]
    decoder(contents[1:])
    assert calls == [1, 1, 1, 2]


def test_device_that_cannot_decode_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(encoded: list[torch.Tensor], **_: object) -> list[torch.Tensor]:
        raise RuntimeError("torchvision was built without nvJPEG")

    monkeypatch.setattr(device, "decode_jpeg", reject)
    with pytest.raises(RunError, match=r"cpu cannot decode JPEGs \(torchvision was built"):
        DeviceDecoder(IMAGENET, MAX_PIXELS, CPU)


def test_device_that_decodes_to_wrong_pixels_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def blank_the_grey_image(encoded: list[torch.Tensor], **kwargs: object) -> list[torch.Tensor]:
        first, second = decode_jpeg(encoded, **kwargs)
        return [first, torch.zeros_like(second)]

    decode_jpeg = getattr(device, "decode_jpeg")  # noqa: B009 - not a public name of the module
    monkeypatch.setattr(device, "decode_jpeg", blank_the_grey_image)
    with pytest.raises(RunError, match="cpu decodes JPEGs to other pixels"):
        DeviceDecoder(IMAGENET, MAX_PIXELS, CPU)
