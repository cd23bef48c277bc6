"""Winograd's convolutions beside torch's own."""

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
from pipelines.models.cpu.winograd import WinogradConv2d, can_filter, load_library
from pipelines.models.prepare import prepare_for_inference
from pipelines.runtime.cpu import cpu_flags

pytestmark = pytest.mark.skipif(not cpu_flags() >= winograd.NEEDED_CPU_FLAGS, reason="a CPU without AVX2")

# Batch, height, width, channels in and out: whole and broken tiles and vectors, one pixel, many chunks of tiles.
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


def filtered(convolution: nn.Conv2d, has_relu: bool = False) -> WinogradConv2d:
    library = load_library()
    assert library is not None
    return WinogradConv2d(convolution, has_relu, library)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("has_relu", "bias"), [(True, True), (False, False)])
@torch.inference_mode()
def test_results_are_torchs_but_for_rounding(shape: tuple[int, ...], has_relu: bool, bias: bool) -> None:
    batch, height, width, in_channels, out_channels = shape
    convolution = make(in_channels, out_channels, bias)
    layer = filtered(convolution, has_relu)
    images = torch.randn(batch, in_channels, height, width)
    exact = convolution.double()(images.double())
    expected = exact.relu() if has_relu else exact
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        found = layer(given)
        assert found.shape == expected.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - expected).abs().max() < 1e-5  # of values about 0.6; torch's own float32 comes to 6e-6


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_neighbours() -> None:
    layer = filtered(make(20, 36), has_relu=True)
    images = torch.randn(9, 20, 15, 11)
    together = layer(images)
    for place in range(9):
        others = torch.randn(9, 20, 15, 11)
        others[8 - place] = images[place]
        assert torch.equal(layer(others)[8 - place], together[place])
    images[3, 0, 7, 7] = torch.nan
    broken = layer(images)
    assert broken[3].isnan().any()
    assert torch.equal(torch.cat([broken[:3], broken[4:]]), torch.cat([together[:3], together[4:]]))


@torch.inference_mode()
def test_a_whole_model_rounds_as_torchs_does() -> None:
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
def test_other_inputs_are_refused() -> None:
    layer = filtered(make(16, 16))
    for images in (torch.zeros(1, 17, 8, 8), torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="16 channels of float32 expected"):
            layer(images)


@torch.inference_mode()
def test_threads_do_not_meet() -> None:
    layers = [filtered(make(16 * width, 64)) for width in (1, 2, 3)]
    images = [torch.randn(4, 16 * width, 28, 28) for width in (1, 2, 3)]
    expected = [layer(batch) for layer, batch in zip(layers, images)]

    @torch.inference_mode()
    def compute(turn: int) -> bool:
        return torch.equal(layers[turn % 3](images[turn % 3]), expected[turn % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(60)))


def test_only_what_gains_is_filtered() -> None:
    assert can_filter(make(16, 16))
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
        assert not can_filter(other)


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_machines_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library()
    assert len(list(tmp_path.glob("ecaray/*.so"))) == 1
    load_library.cache_clear()
    monkeypatch.setattr(winograd, "_compile_to", None)
    assert load_library()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CXX", "no-such-compiler"), ("CXX", "false"), ("XDG_CACHE_HOME", "/proc/nothing-can-be-written-here")],
)
@pytest.mark.usefixtures("nothing_compiled")
def test_what_cannot_be_compiled_stays(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    assert load_library() is None
    (record,) = caplog.records
    assert "take twice as long as they could" in record.message
    model = prepare_for_inference(nn.Sequential(make(16, 16), nn.ReLU()).eval())
    pack_convolutions(model)
    assert [type(layer) for layer in model.children()] == [PackedConv2d]
