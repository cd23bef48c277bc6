"""Placement of quantize operations: no consumer reads a quantized activation in float32, and results stay close."""

import copy

import pytest
import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401 - registers the operators
from timm.layers import EcaModule
from torch import fx, nn

from pipelines.models.cpu.compiled import quiet_compiler
from pipelines.models.cpu.int8 import _quantize
from pipelines.models.cpu.rounding import simplify_quantization

aten = torch.ops.aten
RELUS = {aten.relu.default, aten.relu_.default}


class Gated(nn.Module):
    """Convolution with a channel gate and a shortcut, and a convolution that reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.gate = EcaModule(16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute on batch x 16 x height x width."""
        shortcut = self.first(images).relu()
        gated = self.gate(self.second(shortcut))
        gated += shortcut
        pooled: torch.Tensor = self.last(gated.relu()).mean((2, 3))
        return pooled


class Overwritten(nn.Module):
    """Activation that is overwritten after a convolution has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute on batch x 16 x height x width."""
        activation = self.first(images)
        read = self.last(activation).mean((2, 3))
        written: torch.Tensor = activation.add_(1).mean((2, 3)) + read
        return written


class Returned(nn.Module):
    """Activation that is also an output, like an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute on batch x 16 x height x width."""
        activation = self.first(images).relu()
        return self.last(activation), activation


@pytest.fixture
def batch() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(8, 16, 12, 12)


def before_and_after(module: nn.Module, batch: torch.Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    with torch.no_grad(), quiet_compiler():
        before = _quantize(module.eval(), [batch])
        after = copy.deepcopy(before)
        simplify_quantization(after)
    return before, after


def is_quantize(node: fx.Node) -> bool:
    return node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default


def float32_readers(program: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that read the activation of a convolution in float32 although it is quantized for others."""
    readers: list[fx.Node] = []
    for node in program.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        (last,) = [user for user in node.users if user.target in RELUS] or [node]
        if any(is_quantize(user) for user in last.users):
            readers += [user for user in last.users if not is_quantize(user)]
    return readers


def test_all_consumers_read_int8_and_fused_products_are_not_quantized(batch: torch.Tensor) -> None:
    before, after = before_and_after(Gated(), batch)
    assert {node.target for node in float32_readers(before)} >= {aten.mean.dim, aten.expand_as.default}
    assert float32_readers(after) == []
    (product,) = after.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert not any(is_quantize(user) for user in product.users)
    assert aten.expand_as.default in {factor.target for factor in product.args}


def test_results_change_by_less_than_a_quantization_step(batch: torch.Tensor) -> None:
    module = Gated()
    before, after = before_and_after(module, batch)
    with torch.no_grad():
        exact, rounded, simplified = module(batch), before(batch), after(batch)
    step = (exact.max() - exact.min()) / 255
    assert not torch.equal(simplified, rounded)
    assert (simplified - exact).abs().max() < step
    assert (rounded - exact).abs().max() < step


def test_overwritten_activation_is_left_unchanged(batch: torch.Tensor) -> None:
    before, after = before_and_after(Overwritten(), batch)
    with torch.no_grad():
        assert torch.equal(before(batch), after(batch))


def test_returned_activation_is_not_quantized(batch: torch.Tensor) -> None:
    before, after = before_and_after(Returned(), batch)
    with torch.no_grad():
        for theirs, ours in zip(before(batch), after(batch)):
            assert torch.equal(theirs, ours)


def test_overwritten_dequantized_value_is_left_unchanged(batch: torch.Tensor) -> None:
    def add_to_dequantized(images: torch.Tensor) -> torch.Tensor:
        activation: torch.Tensor = aten.relu.default(images)
        parameters = (1 / 255, 0, 0, 255, torch.uint8)
        quantized = torch.ops.quantized_decomposed.quantize_per_tensor.default(activation, *parameters)
        dequantized = torch.ops.quantized_decomposed.dequantize_per_tensor.default(quantized, *parameters)
        total: torch.Tensor = aten.add_.Tensor(dequantized, images)
        return total + activation.neg()

    before = fx.symbolic_trace(add_to_dequantized)
    after = copy.deepcopy(before)
    simplify_quantization(after)
    assert torch.equal(before(batch), after(batch))
