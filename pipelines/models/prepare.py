"""Graph optimizations for inference: fewer passes over memory, and rounding that does not depend on the batch."""

import logging
import operator
from typing import cast

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

log = logging.getLogger(__name__)

# Methods that read a tensor without keeping a view of it.
READING_METHODS = ("mean", "size", "expand_as")


def prepare_for_inference(module: nn.Module) -> nn.Module:
    """Fold batch norms into convolutions, compute in place, and make the rounding of gates independent of the batch.

    Folding saves a pass over every activation, which is 10 to 25 % of the time on CPUs. It is done in float64, so that
    results stay as close to those of timm as float32 allows. A module that torch.fx cannot trace is returned as it is.

    Args:
        module: Module in float32 and eval mode. It is modified.
    """
    try:
        folded: fx.GraphModule = cast(fx.GraphModule, fuse(module.double(), inplace=True).float())
    except Exception as error:  # tracing fails in as many ways as models are written
        log.info(
            "batch norm was not folded (torch.fx could not trace this model: %s); inference will be about 10 %% slower",
            error,
        )
        return module.float().requires_grad_(False)
    _remove_identities(folded)
    _compute_gates_in_float64(folded)
    _compute_in_place(folded)
    folded.recompile()
    return folded.requires_grad_(False)


def _remove_identities(module: fx.GraphModule) -> None:
    """Remove identity layers, so that later passes see which layers follow each other directly."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and type(module.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)


def _compute_gates_in_float64(module: fx.GraphModule) -> None:
    """Compute the sigmoid of each channel gate in float64.

    torch's CPU kernel computes the last elements of a thread's chunk one by one, with a sigmoid that differs from the
    vectorized one in the last bit, so that an image's result would depend on its position in the batch. Rounded from
    float64, both give the same float32. A gate has only batch x channels values, so the cost is negligible.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_method" and node.target == "sigmoid":
            gate = node.args[0]
            with module.graph.inserting_before(node):
                node.args = (module.graph.call_method("double", (gate,)),)
            with module.graph.inserting_after(node):
                rounded = module.graph.call_method("type_as", (node, gate))
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)


def _compute_in_place(module: fx.GraphModule) -> None:
    """Multiply and add in place if nothing reads the first operand afterwards.

    Tracing turns timm's `x += shortcut` into `x + shortcut`, whose result needs new memory. On CPUs, that takes nearly
    twice as long as the operation in place.
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
        if is_last and _owns_memory(first, module):
            layer = in_place[node.target]
            name = type(layer).__name__
            module.add_submodule(name, layer)
            node.op, node.target = "call_module", name


class MultiplyInPlace(nn.Module):
    """Product that is stored in its first factor if it has the same shape and dtype."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Multiply two tensors that broadcast."""
        return first.mul_(second) if _holds_result(first, second) else first * second


class AddInPlace(nn.Module):
    """Sum that is stored in its first addend if it has the same shape and dtype."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Add two tensors that broadcast."""
        return first.add_(second) if _holds_result(first, second) else first + second


def _holds_result(first: object, second: object) -> bool:
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False  # graphs also multiply and add sizes, which are integers
    sizes = zip(reversed(first.shape), reversed(second.shape))
    has_shape = second.ndim <= first.ndim and all(other in (1, size) for size, other in sizes)
    return has_shape and first.dtype == torch.promote_types(first.dtype, second.dtype)


def _owns_memory(node: fx.Node, module: fx.GraphModule) -> bool:
    """Return whether the result of a node has its own memory, rather than being a view."""
    if isinstance(node.target, str) and node.op == "call_module":
        return isinstance(module.get_submodule(node.target), nn.Conv2d | MultiplyInPlace | AddInPlace)
    return node.target is operator.mul or node.target is operator.add


def _only_reads(user: fx.Node, node: fx.Node) -> bool:
    if user.op == "call_method":
        is_expanded = user.target == "expand_as" and user.args[0] is node
        return user.target in READING_METHODS and not is_expanded
    return user.target is getattr and user.args == (node, "shape")
