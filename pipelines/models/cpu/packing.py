"""A model's convolutions, exchanged for the fastest of their kind on CPUs."""

import torch
from torch import fx, nn

from pipelines.models.cpu.onednn import PackedConv2d
from pipelines.models.cpu.winograd import WinogradConv2d, can_filter, load_library


def pack_convolutions(model: nn.Module) -> None:
    """Pack the convolutions of a traced model; in others none, for what follows their layers is not known.

    In place: were there a second module, the weights would lie in memory twice for as long as the first one does.

    Args:
        model: on the CPU, in the precision and layout to compute in. It can't be pickled or cast afterwards.
    """
    if not (isinstance(model, fx.GraphModule) and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return
    for number, node in enumerate(list(model.graph.nodes)):
        convolution = model.get_submodule(node.target) if node.op == "call_module" else None
        if type(convolution) is not nn.Conv2d or not _can_pack(convolution):
            continue
        relu = _relu_after(node, model)
        name = f"packed_{number}"
        model.add_submodule(name, _pack(convolution, has_relu=relu is not None))
        node.target = name
        if relu is not None:
            relu.replace_all_uses_with(node)
            model.graph.erase_node(relu)
    model.delete_all_unused_submodules()
    model.recompile()


def _pack(convolution: nn.Conv2d, has_relu: bool) -> nn.Module:
    if can_filter(convolution) and (library := load_library()):
        return WinogradConv2d(convolution, has_relu, library)
    return PackedConv2d(convolution, has_relu)


def _can_pack(convolution: nn.Conv2d) -> bool:
    if isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
        return False
    if not all(values.isfinite().all() for values in convolution.parameters()):  # of a folded variance below zero
        return False
    if convolution.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # Not float16: what overflows in it ends as NaN, and should be seen.
    return convolution.weight.dtype == torch.float32


def _relu_after(node: fx.Node, model: fx.GraphModule) -> fx.Node | None:
    """The ReLU that is the only one to read a node's result."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    is_relu = user.op == "call_module" and type(model.get_submodule(str(user.target))) is nn.ReLU
    return user if is_relu else None
