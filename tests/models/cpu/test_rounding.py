"""Where programs in int8 round: what convolutions give is never read in float32, and results stay."""

import copy

import pytest
import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401 - registers the operators
from timm.layers import EcaModule
from torch import fx, nn

from pipelines.models.cpu.compiled import quiet_compiler
from pipelines.models.cpu.int8 import _quantize
from pipelines.models.cpu.rounding import simplify_rounding

aten = torch.ops.aten
RELUS = {aten.relu.default, aten.relu_.default}


class Gated(nn.Module):
    """A convolution with a channel gate and a shortcut, and one that reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.gate = EcaModule(16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x 16 x height x width."""
        shortcut = self.first(images).relu()
        gated = self.gate(self.second(shortcut))
        gated += shortcut
        pooled: torch.Tensor = self.last(gated.relu()).mean((2, 3))
        return pooled


class WrittenOver(nn.Module):
    """An activation that is written over once a convolution has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x 16 x height x width."""
        activation = self.first(images)
        read = self.last(activation).mean((2, 3))
        written: torch.Tensor = activation.add_(1).mean((2, 3)) + read
        return written


class Returned(nn.Module):
    """An activation that is a result too, as embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch x 16 x height x width."""
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
        simplify_rounding(after)
    return before, after


def is_rounding(node: fx.Node) -> bool:
    return node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default


def readers_in_float32(program: fx.GraphModule) -> list[fx.Node]:
    """Of convolutions that feed more than the program's end."""
    read: list[fx.Node] = []
    for node in program.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        (last,) = [user for user in node.users if user.target in RELUS] or [node]
        if any(is_rounding(user) for user in last.users):
            read += [user for user in last.users if not is_rounding(user)]
    return read


def test_activations_are_read_rounded_and_rounded_once(batch: torch.Tensor) -> None:
    before, after = before_and_after(Gated(), batch)
    assert {node.target for node in readers_in_float32(before)} >= {aten.mean.dim, aten.expand_as.default}
    assert readers_in_float32(after) == []
    (product,) = after.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert not any(is_rounding(user) for user in product.users)
    assert aten.expand_as.default in {factor.target for factor in product.args}


def test_results_stay(batch: torch.Tensor) -> None:
    module = Gated()
    before, after = before_and_after(module, batch)
    with torch.no_grad():
        exact, rounded, simplified = module(batch), before(batch), after(batch)
    step = (exact.max() - exact.min()) / 255
    assert not torch.equal(simplified, rounded)
    assert (simplified - exact).abs().max() < step
    assert (rounded - exact).abs().max() < step


def test_what_is_written_over_is_left_alone(batch: torch.Tensor) -> None:
    before, after = before_and_after(WrittenOver(), batch)
    with torch.no_grad():
        assert torch.equal(before(batch), after(batch))


def test_what_is_returned_is_not_rounded(batch: torch.Tensor) -> None:
    before, after = before_and_after(Returned(), batch)
    with torch.no_grad():
        for theirs, ours in zip(before(batch), after(batch)):
            assert torch.equal(theirs, ours)


def test_what_was_rounded_to_be_written_over_is_left_alone(batch: torch.Tensor) -> None:
    def add_to_rounded(images: torch.Tensor) -> torch.Tensor:
        activation: torch.Tensor = aten.relu.default(images)
        how = (1 / 255, 0, 0, 255, torch.uint8)
        rounded = torch.ops.quantized_decomposed.quantize_per_tensor.default(activation, *how)
        read = torch.ops.quantized_decomposed.dequantize_per_tensor.default(rounded, *how)
        total: torch.Tensor = aten.add_.Tensor(read, images)
        return total + activation.neg()

    before = fx.symbolic_trace(add_to_rounded)
    after = copy.deepcopy(before)
    simplify_rounding(after)
    assert torch.equal(before(batch), after(batch))
