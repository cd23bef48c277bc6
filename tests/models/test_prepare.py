"""Graphs made ready for inference, beside timm's modules."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

from pipelines.models.onednn import PackedConv2d, pack_convolutions
from pipelines.models.prepare import prepare_for_inference

# With channel gates, with squeeze and excitation, with depthwise convolutions, without any convolution but the first.
MODELS = ["test_resnet", "ecaresnet26t", "seresnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"]


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)


def telling(name: str) -> Any:
    """A model whose batch norms do something."""
    torch.manual_seed(0)
    module: Any = timm.create_model(name).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_prepared_and_packed_models_give_what_timms_gives(name: str, images: torch.Tensor) -> None:
    module = telling(name)
    expected = module(images)
    prepared = prepare_for_inference(module).to(memory_format=torch.channels_last)
    packed = pack_convolutions(prepared)
    tolerance = 1e-4 * float(expected.abs().max())
    for model in (prepared, packed, packed):  # the second pass finds nothing changed by the first
        assert torch.allclose(model(images), expected, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_gated_and_added_activations_take_no_memory_of_their_own(images: torch.Tensor) -> None:
    prepared = prepare_for_inference(telling("ecaresnet26t"))
    assert isinstance(prepared, fx.GraphModule)
    targets = [node.target for node in prepared.graph.nodes]
    num_blocks = 8
    assert targets.count("MultiplyInPlace") == targets.count("AddInPlace") == num_blocks
    kept = images.clone()
    prepared(images)
    assert torch.equal(images, kept)


class ReadsAgain(nn.Module):
    """Whatever is multiplied or added is needed once more, is no memory of its own, or does not hold the result."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(3, 8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x 3 x H x W."""
        features = self.convolution(images)
        view = features.flatten(2)
        gate = self.gate(images.mean((2, 3), keepdim=True))
        gated = features * gate + view.mean()  # `view` is read after the product
        small = self.gate(images.mean((2, 3), keepdim=True)) * gated  # smaller than the result
        result: torch.Tensor = (small + gated) * gated + view.view(features.shape) + (images + images).mean()
        return result


@torch.inference_mode()
def test_what_is_read_again_is_not_overwritten(images: torch.Tensor) -> None:
    module = ReadsAgain().eval()
    expected, kept = module(images), images.clone()
    prepared = prepare_for_inference(copy.deepcopy(module))
    assert torch.allclose(prepared(images), expected, atol=1e-5)
    assert torch.allclose(pack_convolutions(prepared)(images), expected, atol=1e-5)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packing_changes_no_bits(images: torch.Tensor, dtype: torch.dtype) -> None:
    prepared = prepare_for_inference(telling("ecaresnet26t")).to(dtype).to(memory_format=torch.channels_last)
    expected = prepared(images.to(dtype))
    packed = pack_convolutions(prepared)
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedConv2d)]
    assert len(layers) == sum(isinstance(layer, nn.Conv2d) for layer in prepared.modules())
    assert sum(layer.has_relu for layer in layers) == 3 + 2 * 8  # the stem's, and two of each block
    assert torch.equal(packed(images.to(dtype)), expected)
    assert torch.equal(prepared(images.to(dtype)), expected), "the model itself is packed"


class Unusual(nn.Module):
    """Convolutions that can't be packed, and a ReLU whose input is read by another too."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, 3, padding="same")
        self.mirrored = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.plain = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x 3 x H x W."""
        plain = self.plain(images)
        result: torch.Tensor = self.act(plain) - plain + self.same(images) + self.mirrored(images)
        result += self.plain(-images)
        return result


@torch.inference_mode()
def test_what_cannot_be_packed_stays(images: torch.Tensor) -> None:
    module = Unusual().eval()
    expected = module(images)
    packed = pack_convolutions(prepare_for_inference(copy.deepcopy(module)))
    assert torch.allclose(packed(images), expected, atol=1e-5)
    assert sum(isinstance(layer, PackedConv2d) for layer in packed.modules()) == 2
    assert pack_convolutions(module) is module, "not traced"


@torch.inference_mode()
def test_float16_shows_what_overflows(images: torch.Tensor) -> None:
    prepared = prepare_for_inference(telling("test_resnet")).half().to(memory_format=torch.channels_last)
    assert not any(isinstance(layer, PackedConv2d) for layer in pack_convolutions(prepared).modules())
