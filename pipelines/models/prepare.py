"""A module's graph made ready for inference: fewer passes over memory, and rounding that no neighbour changes."""

import logging
import operator
from typing import cast

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

log = logging.getLogger(__name__)

# What reads a tensor and keeps no view of it.
READING_METHODS = ("mean", "size", "expand_as")


def prepare_for_inference(module: nn.Module) -> nn.Module:
    """Fold batch norms into convolutions, compute in place, and make the gates' rounding independent of the batch.

    Folding saves a pass over every activation, a tenth to a quarter of the time on CPUs; it is done in float64, so that
    the result stays as near to timm's as float32 allows. A module that fx cannot trace stays as it is.

    Args:
        module: float32, in eval mode.
    """
    try:
        folded: fx.GraphModule = cast(fx.GraphModule, fuse(module.double(), inplace=True).float())
    except Exception as error:  # tracing fails in as many ways as models are written
        log.info("batch norm stays as it is: %s", error)
        return module.float().requires_grad_(False)
    _drop_identities(folded)
    _sigmoid_in_float64(folded)
    _reuse_memory(folded)
    folded.recompile()
    return folded.requires_grad_(False)


def _drop_identities(module: fx.GraphModule) -> None:
    """So that what follows a layer is seen beside it."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and type(module.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)


def _sigmoid_in_float64(module: fx.GraphModule) -> None:
    """Compute the sigmoid of each channel gate in float64.

    torch's CPU kernel takes the last elements of a thread's share one by one, with a sigmoid that differs from the
    vectorized one in the last bit: an image's result would depend on its place in the batch. Rounded from float64, both
    are the same float32. A gate holds batch x channels values, so that this costs nothing.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_method" and node.target == "sigmoid":
            gate = node.args[0]
            with module.graph.inserting_before(node):
                node.args = (module.graph.call_method("double", (gate,)),)
            with module.graph.inserting_after(node):
                rounded = module.graph.call_method("type_as", (node, gate))
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)


def _reuse_memory(module: fx.GraphModule) -> None:
    """Write gated and added activations over those that nothing reads any more.

    Tracing turns timm's `x += shortcut` into `x + shortcut`, whose result needs fresh memory: on CPUs these passes take
    nearly twice the time of those in place.
    """
    in_place = {operator.mul: MultiplyInPlace(), operator.add: AddInPlace()}
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in in_place:
            continue
        first, second = node.args
        if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and first is not second):
            continue
        others = [user for user in first.users if user is not node]
        is_last = all(position[user] < position[node] and _only_reads(user, first) for user in others)
        if is_last and _makes_its_own(first, module):
            layer = in_place[node.target]
            name = type(layer).__name__
            module.add_submodule(name, layer)
            node.op, node.target = "call_module", name


class MultiplyInPlace(nn.Module):
    """A product, in the memory of its first factor where it fits."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two tensors that broadcast."""
        return first.mul_(second) if _holds_result(first, second) else first * second


class AddInPlace(nn.Module):
    """A sum, in the memory of its first addend where it fits."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two tensors that broadcast."""
        return first.add_(second) if _holds_result(first, second) else first + second


def _holds_result(first: object, second: object) -> bool:
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False  # sizes are multiplied and added too
    sizes = zip(reversed(first.shape), reversed(second.shape))
    has_shape = second.ndim <= first.ndim and all(theirs in (1, size) for size, theirs in sizes)
    return has_shape and first.dtype == torch.promote_types(first.dtype, second.dtype)


def _makes_its_own(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node's result is no other's memory."""
    if isinstance(node.target, str) and node.op == "call_module":
        return isinstance(module.get_submodule(node.target), nn.Conv2d | MultiplyInPlace | AddInPlace)
    return node.target is operator.mul or node.target is operator.add


def _only_reads(user: fx.Node, node: fx.Node) -> bool:
    if user.op == "call_method":
        is_expanded = user.target == "expand_as" and user.args[0] is node
        return user.target in READING_METHODS and not is_expanded
    return user.target is getattr and user.args == (node, "shape")
