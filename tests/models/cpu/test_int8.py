"""Models in int8: close to float32 or refused, and compiled only once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.config.sections import ModelConfig, PreprocessConfig, QuantizationConfig
from pipelines.errors import RequestError
from pipelines.models.bundle import ModelBundle
from pipelines.models.cpu import compiled
from pipelines.models.cpu.compiled import Forward, compile_program
from pipelines.models.cpu.int8 import quantize_bundle
from pipelines.models.normalize import Normalizer
from pipelines.models.resolve import resolve_bundle
from pipelines.runtime.cpu import why_no_int8

pytestmark = pytest.mark.skipif(why_no_int8() is not None, reason=f"no int8 on this machine: {why_no_int8()}")

NAME = "test_resnet"
SHAPE = (8, 160, 160, 3)
ANYTHING = QuantizationConfig(min_agreement=0)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> "object":
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def bundle(telling_weights: Callable[[str], Path]) -> ModelBundle:
    model = ModelConfig(name=NAME, weights=str(telling_weights(NAME)), dtype="int8")
    return resolve_bundle(model, PreprocessConfig())


@pytest.fixture(scope="module")
def images(bundle: ModelBundle, photographs: Path) -> NDArray[np.uint8]:
    opened = [Image.open(path).convert("RGB") for path in sorted(photographs.iterdir())]
    return np.stack([bundle.transform.apply(image, 10**9) for image in opened])


@pytest.fixture(scope="module")
def quantized(bundle: ModelBundle, images: NDArray[np.uint8]) -> ModelBundle:
    return quantize_bundle(bundle, images, ANYTHING)


@pytest.fixture(scope="module")
def forward(quantized: ModelBundle) -> Forward:
    assert isinstance(quantized.module, bytes)
    return compile_program(quantized.module, SHAPE, 2)


@pytest.fixture(scope="module")
def batch(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images[: SHAPE[0]])


def test_results_are_close_to_float32(bundle: ModelBundle, forward: Forward, batch: torch.Tensor) -> None:
    assert isinstance(bundle.module, torch.nn.Module)
    normalize = Normalizer(bundle.transform.mean, bundle.transform.std)
    with torch.no_grad():
        theirs = bundle.module(normalize(batch))
    for ours, exact in zip(forward(batch), theirs):
        assert not torch.equal(ours, exact)
        assert torch.cosine_similarity(ours, exact).min() > 0.98


def test_row_does_not_depend_on_its_position_in_the_batch(forward: Forward, batch: torch.Tensor) -> None:
    for shift in range(1, len(batch)):
        for moved, stayed in zip(forward(batch.roll(shift, 0)), forward(batch)):
            assert torch.equal(moved.roll(-shift, 0), stayed)


def test_concurrent_calls_give_the_same_rows(forward: Forward, batch: torch.Tensor) -> None:
    logits, features = forward(batch)
    with ThreadPoolExecutor(4) as threads:
        for other_logits, other_features in threads.map(forward, [batch] * 8):
            assert torch.equal(other_logits, logits)
            assert torch.equal(other_features, features)


def test_model_is_quantized_and_compiled_once(
    bundle: ModelBundle, images: NDArray[np.uint8], quantized: ModelBundle, forward: Forward
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.models.cpu.int8._quantize", lambda *_: pytest.fail("quantized again"))
        patch.setattr(compiled, "_compile_to", lambda *_: pytest.fail("compiled again"))
        again = quantize_bundle(bundle, images, ANYTHING)
        assert again == quantized
        assert isinstance(again.module, bytes)
        compile_program(again.module, SHAPE, 2)


def test_fingerprint_covers_the_images_and_the_min_agreement(
    bundle: ModelBundle, images: NDArray[np.uint8], quantized: ModelBundle
) -> None:
    others = [
        bundle,
        quantize_bundle(bundle, images[:8], ANYTHING),
        quantize_bundle(bundle, images[:8], QuantizationConfig(min_agreement=0.01)),
        quantize_bundle(bundle, images[:1], ANYTHING),
    ]
    assert len({quantized.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_model_that_disagrees_with_float32_is_refused(bundle: ModelBundle, images: NDArray[np.uint8]) -> None:
    # Ranges calibrated on black images clip the values of photographs. Of every four images, two are for calibration.
    mixed = images[:64].copy()
    mixed[0::4] = mixed[1::4] = 0
    with pytest.raises(RequestError, match=r"same top-1 as float32 on .* of 32 images of the input, less than"):
        quantize_bundle(bundle, mixed, QuantizationConfig(min_agreement=1))


def test_model_that_cannot_be_exported_is_refused(bundle: ModelBundle, images: NDArray[np.uint8]) -> None:
    class Branching(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch if batch.sum() > 0 else -batch

    with pytest.raises(RequestError, match="test_resnet cannot be quantized: "):
        quantize_bundle(replace(bundle, module=Branching()), images[:5], ANYTHING)
