"""Replica on a real GPU. Skipped on machines without one."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from cluster.local.photographs import crops, encode
from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.engine import pixels
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.options import PredictOptions
from pipelines.engine.predict import Predictor
from pipelines.images.device import DeviceDecoder
from pipelines.images.jpeg import size_for_device
from pipelines.images.preprocess import Mode
from pipelines.images.transform import EvalTransform
from pipelines.models.accelerators import choose_accelerator
from pipelines.models.resolve import prepare_bundle, resolve_bundle
from tests.images.test_fast import IMAGENET
from tests.support.embeddings import cosines
from tests.support.schemas import columns_of

pytestmark = pytest.mark.gpu
BATCH_SIZE = 16


def read(photographs: Path, transform: EvalTransform, mode: Mode = "exact") -> pa.Table:
    paths = [str(path) for path in sorted(photographs.iterdir())]
    decode = FetchAndDecode(transform, 10**8, 10**8, mode)
    return decode(pa.table({"id": np.arange(len(paths)), "uri": paths}))


@pytest.mark.parametrize("name", ["ecaresnet50d", "ecaresnet50d_pruned"])  # one of each layout
def test_concurrent_batches_on_a_gpu_give_the_rows_of_a_cpu(
    name: str, photographs: Path, telling_weights: Callable[[str], Path]
) -> None:
    bundle = prepare_bundle(
        resolve_bundle(ModelConfig(name=name, weights=str(telling_weights(name))), PreprocessConfig())
    )
    images = read(photographs, bundle.transform)
    expected = Predictor(copy.deepcopy(bundle), PredictOptions(BATCH_SIZE, columns_of(5, True), use_gpu=False))(images)
    on_gpu = Predictor(bundle, PredictOptions(BATCH_SIZE, columns_of(5, True), use_gpu=True))
    with ThreadPoolExecutor(2) as threads:
        many = list(threads.map(on_gpu, [images] * 8))
    assert all(rows.equals(many[0]) for rows in many)
    there, here = (np.stack(rows["embedding"].to_numpy()) for rows in (many[0], expected))
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=1e-3)
    there, here = (np.stack(rows["prob"].to_numpy()) for rows in (many[0], expected))
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=1e-4)
    is_clear = here[:, 0] - here[:, 1] > 1e-3
    assert is_clear.mean() > 0.5
    there, here = (np.stack(rows["index"].to_numpy())[is_clear, 0] for rows in (many[0], expected))
    assert there.tolist() == here.tolist()


@pytest.mark.parametrize(
    ("dtype", "is_compiled"), [("bfloat16", False), ("float16", False), ("float32", True), ("bfloat16", True)]
)
def test_lower_precision_and_compiled_code_stay_close(
    dtype: str, is_compiled: bool, photographs: Path, telling_weights: Callable[[str], Path]
) -> None:
    config = ModelConfig(name="ecaresnet50d", weights=str(telling_weights("ecaresnet50d")))
    bundle = prepare_bundle(resolve_bundle(config, PreprocessConfig()))
    images = read(photographs, bundle.transform)
    options = PredictOptions(BATCH_SIZE, columns_of(5, True), use_gpu=True)
    expected = Predictor(copy.deepcopy(bundle), options)(images)
    lower = prepare_bundle(resolve_bundle(config.model_copy(update={"dtype": dtype}), PreprocessConfig()))
    predict = Predictor(lower, replace(options, compile=is_compiled))
    with ThreadPoolExecutor(2) as threads:
        many = list(threads.map(predict, [images] * 8))
    assert all(rows.equals(many[0]) for rows in many)
    assert cosines(many[0], expected).min() > 0.99
    assert np.median(cosines(many[0], expected)) > 0.999


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:2:0"}),
        ("RGB", {"progressive": True}),
        ("L", {}),
    ],
    ids=str,
)
def test_gpu_decodes_each_kind_of_jpeg_as_a_cpu_does(mode: str, options: dict[str, Any]) -> None:
    contents = []
    for position, (_, crop) in enumerate(crops(300, size=(500, 375))):
        image = crop.resize((crop.width - position % 17, crop.height - position % 13))  # odd sides too
        contents.append(encode(image.convert(mode), **options))
    assert all(size_for_device(content, IMAGENET, 10**8) for content in contents)
    there = DeviceDecoder(IMAGENET, 10**8, choose_accelerator(torch.device("cuda")))(contents)
    here = DeviceDecoder(IMAGENET, 10**8, choose_accelerator(torch.device("cpu")))(contents)
    for found, expected in zip(there, here, strict=True):
        assert isinstance(found, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        assert found.is_cuda
        assert (found.cpu().float() - expected.float()).abs().mean() < 2


def test_gpu_decodes_nearly_the_same_pixels_while_it_predicts(
    photographs: Path, telling_weights: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(telling_weights("ecaresnet50d"))
    bundle = prepare_bundle(resolve_bundle(ModelConfig(name="ecaresnet50d", weights=weights), PreprocessConfig()))
    options = PredictOptions(BATCH_SIZE, columns_of(5, True), use_gpu=True, max_pixels=10**8)
    encoded, exact = read(photographs, bundle.transform, "cuda"), read(photographs, bundle.transform)
    predict = Predictor(bundle, options)
    there, here = predict(encoded), predict(exact)
    assert there["error_kind"].equals(here["error_kind"])
    is_jpeg = encoded["jpeg"].is_valid()
    assert pc.sum(is_jpeg).as_py() > 5  # most photographs have other formats
    assert cosines(there.filter(is_jpeg), here.filter(is_jpeg)).min() > 0.98
    monkeypatch.setattr(pixels, "MAX_PIXELS_PER_DECODE", 300_000)  # in several groups
    with ThreadPoolExecutor(2) as threads:
        assert all(rows.equals(there) for rows in threads.map(predict, [encoded] * 16))
