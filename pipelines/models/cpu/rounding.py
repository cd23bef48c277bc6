"""Placement of the quantize operations in an int8 program, so that they minimize memory traffic.

torchao quantizes an activation only for the operators that compute in int8. All other consumers read it in float32,
four times as large. In an ECA ResNet, the gates and the shortcuts do so, which takes 20 to 33 % of the time.
"""

import torch
from torch import fx

aten = torch.ops.aten
# The compiler fuses these operators into one loop, whose intermediate results never reach memory.
FUSED = {aten.mul.Tensor, aten.add.Tensor, aten.add_.Tensor, aten.relu.default, aten.relu_.default}
FUSED_PRODUCERS = FUSED | {aten.sigmoid.default, aten.expand_as.default}


def simplify_quantization(program: fx.GraphModule) -> None:
    """If one consumer reads an activation as int8, make all of them do so, and drop quantization inside fused chains.

    The program is modified in place. Results change by the rounding to 8 bits that is added or dropped.

    Args:
        program: Result of torchao's `convert_pt2e`.
    """
    for node in list(program.graph.nodes):
        _share_quantized(node)
    for node in list(program.graph.nodes):
        _drop_inside_fused(node)
    program.graph.eliminate_dead_code()
    program.recompile()


def _share_quantized(node: fx.Node) -> None:
    """Make all consumers of a node read its quantized value, if one of them does."""
    quantize_nodes = [user for user in node.users if _is_quantize(user)]
    if not quantize_nodes:
        return
    quantize = quantize_nodes[0]
    dequantize = next(iter(quantize.users))
    if any(_writes_to(user, tensor) for tensor in (node, dequantize) for user in tensor.users):
        return
    # Move both directly behind the node, because other consumers may precede the one they were created for.
    node.append(quantize)
    quantize.append(dequantize)
    for user in list(node.users):
        if user not in quantize_nodes and user.op != "output":  # outputs such as embeddings stay in float32
            user.replace_input_with(node, dequantize)


def _drop_inside_fused(node: fx.Node) -> None:
    """Drop the quantization of a node that is fused with all of its consumers."""
    if not (
        node.target in FUSED_PRODUCERS and len(node.users) == 1 and _is_quantize(quantize := next(iter(node.users)))
    ):
        return
    dequantize_nodes = list(quantize.users)
    if all(user.target in FUSED for dequantize in dequantize_nodes for user in dequantize.users):
        for dequantize in dequantize_nodes:
            dequantize.replace_all_uses_with(node)


def _is_quantize(node: fx.Node) -> bool:
    return node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    is_in_place = isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
    return is_in_place and user.args[0] is node
