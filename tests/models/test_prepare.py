"""Models prepared for inference, compared with the original timm modules."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

from pipelines.models.cpu.onednn import PackedConv2d
from pipelines.models.cpu.packing import pack_convolutions
from pipelines.models.cpu.winograd import WinogradConv2d, load_library
from pipelines.models.prepare import prepare_for_inference

# Models with channel gates, with squeeze and excitation, with depthwise convolutions, and with only one convolution.
MODELS = ["test_resnet", "ecaresnet26t", "seresnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"]


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)


def with_random_batch_norms(name: str) -> Any:
    """Return a model whose batch norms change their input. Those of a new model do not."""
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
def test_prepared_and_packed_models_equal_the_timm_model(name: str, images: torch.Tensor) -> None:
    module = with_random_batch_norms(name)
    expected = module(images)
    model = prepare_for_inference(module).to(memory_format=torch.channels_last)
    prepared = model(images)
    pack_convolutions(model)
    tolerance = 1e-4 * float(expected.abs().max())
    for found in (prepared, model(images), model(images)):  # twice: the first pass must not change the model
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["ecaresnet26t", "seresnet18", "mobilenetv3_small_050"])
@torch.inference_mode()
def test_prepared_model_compiles_without_graph_breaks(name: str, images: torch.Tensor) -> None:
    prepared = prepare_for_inference(with_random_batch_norms(name))
    compiled = torch.compile(prepared, fullgraph=True, dynamic=False, backend="eager")  # raises at a graph break
    assert torch.equal(compiled(images[:2]), prepared(images[:2]))


@torch.inference_mode()
def test_gates_and_shortcuts_are_computed_in_place(images: torch.Tensor) -> None:
    prepared = prepare_for_inference(with_random_batch_norms("ecaresnet26t"))
    assert isinstance(prepared, fx.GraphModule)
    targets = [node.target for node in prepared.graph.nodes]
    num_blocks = 8
    assert targets.count("MultiplyInPlace") == targets.count("AddInPlace") == num_blocks
    original = images.clone()
    prepared(images)
    assert torch.equal(images, original)


class ReadsAgain(nn.Module):
    """Products and sums that must not be in place: the operand is read again, is a view, is too small, or is a size."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(3, 8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute on batch x 3 x H x W."""
        features = self.convolution(images)
        view = features.flatten(2)
        gate = self.gate(images.mean((2, 3), keepdim=True))
        gated = features * gate + view.mean()  # `view` is read after the product
        small = self.gate(images.mean((2, 3), keepdim=True)) * gated  # smaller than the result
        result: torch.Tensor = (small + gated) * gated + view.view(features.shape) + (images + images).mean()
        batch, channels, height, width = result.shape
        flat = self.identity(input=self.convolution(images) * height).reshape(batch * channels * height, width)
        result += flat.view(result.shape)
        return result


@torch.inference_mode()
def test_tensors_that_are_read_again_are_not_overwritten(images: torch.Tensor) -> None:
    module = ReadsAgain().eval()
    expected, original = module(images), images.clone()
    prepared = prepare_for_inference(copy.deepcopy(module))
    assert torch.allclose(prepared(images), expected, atol=1e-5)
    pack_convolutions(prepared)
    assert torch.allclose(prepared(images), expected, atol=1e-5)
    assert torch.equal(images, original)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@torch.inference_mode()
def test_packing_changes_only_the_rounding(images: torch.Tensor, dtype: torch.dtype, rounding: float) -> None:
    model = (
        prepare_for_inference(with_random_batch_norms("ecaresnet26t")).to(dtype).to(memory_format=torch.channels_last)
    )
    expected = model(images.to(dtype))
    num_convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    pack_convolutions(model)
    layers = packed_layers(model)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert len(layers) == num_convolutions
        assert sum(layer.has_relu for layer in layers) == 3 + 2 * 8  # three in the stem, and two in each block
    else:
        assert not layers
    num_winograd = sum(isinstance(layer, WinogradConv2d) for layer in layers)
    # Two in the stem, and five in blocks with stride 1.
    assert num_winograd == (2 + 5 if dtype == torch.float32 and load_library() else 0)
    tolerance = rounding * float(expected.abs().max())
    assert torch.allclose(model(images.to(dtype)), expected, rtol=0, atol=tolerance)


def packed_layers(model: nn.Module) -> list[PackedConv2d | WinogradConv2d]:
    return [layer for layer in model.modules() if isinstance(layer, PackedConv2d | WinogradConv2d)]


def test_packing_frees_the_original_weights_without_garbage_collection() -> None:
    # Replicas also unpickle the model.
    model = pickle.loads(pickle.dumps(prepare_for_inference(with_random_batch_norms("ecaresnet26t"))))
    weights = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    num_before = num_values(weights)
    gc.disable()
    try:
        pack_convolutions(model)
        assert num_values(weights) < 0.01 * num_before  # unpickling leaves a reference to the stem
    finally:
        gc.enable()


def num_values(weights: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(weight.numel() for reference in weights if (weight := reference()) is not None)


class Unusual(nn.Module):
    """Convolutions that cannot be packed, and a ReLU whose input has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, 3, padding="same")
        self.mirrored = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.plain = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute on batch x 3 x H x W."""
        plain = self.plain(images)
        result: torch.Tensor = self.act(plain) - plain + self.same(images) + self.mirrored(images)
        result += self.plain(-images)
        return result


@torch.inference_mode()
def test_unsupported_convolutions_are_left_unchanged(images: torch.Tensor) -> None:
    module = Unusual().eval()
    expected = module(images)
    model = prepare_for_inference(copy.deepcopy(module))
    pack_convolutions(model)
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert len(packed_layers(model)) == 2
    pack_convolutions(module)
    assert not packed_layers(module), "a module that is not traced must not be packed"


@torch.inference_mode()
def test_nan_is_not_hidden_by_packing(images: torch.Tensor) -> None:
    half = prepare_for_inference(with_random_batch_norms("test_resnet")).half()  # overflows
    module = with_random_batch_norms("test_resnet")
    module.layer2[0].bn1.running_var[0] = -1.0  # has no real square root
    broken = prepare_for_inference(module)
    for model in (half, broken):
        pack_convolutions(model)
    assert not packed_layers(half)
    assert packed_layers(broken)
    assert broken(images).isnan().all()
