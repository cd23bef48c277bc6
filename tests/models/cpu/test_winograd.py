"""Winograd convolutions, compared with those of torch."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from pipelines.models.cpu import winograd
from pipelines.models.cpu.onednn import PackedConv2d
from pipelines.models.cpu.packing import pack_convolutions
from pipelines.models.cpu.winograd import WinogradConv2d, is_supported, load_library
from pipelines.models.prepare import prepare_for_inference
from pipelines.runtime.cpu import cpu_flags

pytestmark = pytest.mark.skipif(not cpu_flags() >= winograd.NEEDED_CPU_FLAGS, reason="a CPU without AVX2")

# Batch, height, width, in and out channels: whole and partial tiles and vectors, one pixel, many chunks of tiles.
SHAPES = [
    (2, 8, 12, 16, 32),
    (2, 7, 9, 16, 17),
    (1, 1, 1, 40, 24),
    (3, 1, 6, 18, 50),
    (16, 14, 14, 47, 18),
    (1, 61, 45, 33, 31),
    (1, 7, 7, 500, 17),
]


def make(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias).requires_grad_(False)


def to_winograd(convolution: nn.Conv2d, has_relu: bool = False) -> WinogradConv2d:
    library = load_library()
    assert library is not None
    return WinogradConv2d(convolution, has_relu, library)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("has_relu", "bias"), [(True, True), (False, False)])
@torch.inference_mode()
def test_results_equal_those_of_torch_up_to_rounding(shape: tuple[int, ...], has_relu: bool, bias: bool) -> None:
    batch, height, width, in_channels, out_channels = shape
    convolution = make(in_channels, out_channels, bias)
    layer = to_winograd(convolution, has_relu)
    images = torch.randn(batch, in_channels, height, width)
    exact = convolution.double()(images.double())
    expected = exact.relu() if has_relu else exact
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        found = layer(given)
        assert found.shape == expected.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - expected).abs().max() < 1e-5  # values are about 0.6; torch's own float32 error is 6e-6


@torch.inference_mode()
def test_image_does_not_depend_on_the_rest_of_the_batch() -> None:
    layer = to_winograd(make(20, 36), has_relu=True)
    images = torch.randn(9, 20, 15, 11)
    together = layer(images)
    for position in range(9):
        others = torch.randn(9, 20, 15, 11)
        others[8 - position] = images[position]
        assert torch.equal(layer(others)[8 - position], together[position])
    images[3, 0, 7, 7] = torch.nan
    broken = layer(images)
    assert broken[3].isnan().any()
    assert torch.equal(torch.cat([broken[:3], broken[4:]]), torch.cat([together[:3], together[4:]]))


@torch.inference_mode()
def test_rounding_error_of_a_whole_model_is_similar_to_torch() -> None:
    torch.manual_seed(0)
    module = timm.create_model("ecaresnet26t").eval()
    images = torch.randn(8, 3, 224, 224)
    exact = copy.deepcopy(module).double()(images.double())
    expected = (module(images) - exact).abs().max()
    model = prepare_for_inference(module)
    pack_convolutions(model)
    assert any(isinstance(layer, WinogradConv2d) for layer in model.modules())
    assert (model(images) - exact).abs().max() < 2 * expected


@torch.inference_mode()
def test_wrong_channels_and_dtypes_are_refused() -> None:
    layer = to_winograd(make(16, 16))
    for images in (torch.zeros(1, 17, 8, 8), torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"expected 16 channels of torch\.float32"):
            layer(images)


@torch.inference_mode()
def test_concurrent_calls_do_not_interfere() -> None:
    layers = [to_winograd(make(16 * width, 64)) for width in (1, 2, 3)]
    images = [torch.randn(4, 16 * width, 28, 28) for width in (1, 2, 3)]
    expected = [layer(batch) for layer, batch in zip(layers, images)]

    @torch.inference_mode()
    def compute(call: int) -> bool:
        return torch.equal(layers[call % 3](images[call % 3]), expected[call % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(60)))


def test_only_convolutions_that_get_faster_are_supported() -> None:
    assert is_supported(make(16, 16))
    for other in (
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, dtype=torch.bfloat16),
    ):
        assert not is_supported(other)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.mark.usefixtures("empty_cache")
def test_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library()
    assert len(list(tmp_path.glob("ecaray/*.so"))) == 1
    load_library.cache_clear()
    monkeypatch.setattr(winograd, "_compile_to", None)
    assert load_library()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CXX", "no-such-compiler"), ("CXX", "false"), ("XDG_CACHE_HOME", "/proc/nothing-can-be-written-here")],
)
@pytest.mark.usefixtures("empty_cache")
def test_torch_convolutions_are_used_if_the_library_cannot_be_compiled(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    assert load_library() is None
    (record,) = caplog.records
    assert "will take twice as long" in record.message
    model = prepare_for_inference(nn.Sequential(make(16, 16), nn.ReLU()).eval())
    pack_convolutions(model)
    assert [type(layer) for layer in model.children()] == [PackedConv2d]
