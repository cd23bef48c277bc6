"""Where a program rounds its activations to 8 bits: as often as it saves memory traffic, and no more.

torchao rounds what an operator reads in int8, for that operator. Whoever else reads the activation reads it in float32,
four times as large. Of an ECA ResNet's time that is a fifth to a third: the gate and the shortcut are such readers.
"""

import torch
from torch import fx

aten = torch.ops.aten
# The compiler makes one loop of them: what one gives to the next never reaches memory.
FUSED = {aten.mul.Tensor, aten.add.Tensor, aten.add_.Tensor, aten.relu.default, aten.relu_.default}
GIVES_TO_FUSED = FUSED | {aten.sigmoid.default, aten.expand_as.default}


def simplify_rounding(program: fx.GraphModule) -> None:
    """Have all layers read an activation rounded that one of them reads so, and round nothing that stays in registers.

    In place. Results change by a rounding to 8 bits of what was not rounded before, and the other way round.

    Args:
        program: of torchao's `convert_pt2e`.
    """
    for node in list(program.graph.nodes):
        _share_rounded(node)
    for node in list(program.graph.nodes):
        _drop_needless(node)
    program.graph.eliminate_dead_code()
    program.recompile()


def _share_rounded(node: fx.Node) -> None:
    roundings = [user for user in node.users if _is_rounding(user)]
    if not roundings:
        return
    rounded = roundings[0]
    read = next(iter(rounded.users))
    if any(_writes_to(user, tensor) for tensor in (node, read) for user in tensor.users):
        return
    # Before all readers, who may have come earlier than the one that it was made for.
    node.append(rounded)
    rounded.append(read)
    for user in list(node.users):
        if user not in roundings and user.op != "output":  # embeddings stay as they are
            user.replace_input_with(node, read)


def _drop_needless(node: fx.Node) -> None:
    if not (node.target in GIVES_TO_FUSED and len(node.users) == 1 and _is_rounding(rounded := next(iter(node.users)))):
        return
    reads = list(rounded.users)
    if all(user.target in FUSED for read in reads for user in read.users):
        for read in reads:
            read.replace_all_uses_with(node)


def _is_rounding(node: fx.Node) -> bool:
    return node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    is_in_place = isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
    return is_in_place and user.args[0] is node
