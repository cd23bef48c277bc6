"""Replacement of a model's convolutions by their fastest implementations for CPUs."""

import torch
from torch import fx, nn

from pipelines.models.cpu.onednn import PackedConv2d
from pipelines.models.cpu.winograd import WinogradConv2d, is_supported, load_library


def pack_convolutions(model: nn.Module) -> None:
    """Replace the convolutions of a traced model by packed ones, together with the ReLUs that follow them.

    Other models are left unchanged, because their graph is not known. The model is modified in place: with a second
    module, the weights would be in memory twice.

    Args:
        model: Model on the CPU, in the precision and layout to compute in. It cannot be pickled or cast afterwards.
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
    if is_supported(convolution) and (library := load_library()):
        return WinogradConv2d(convolution, has_relu, library)
    return PackedConv2d(convolution, has_relu)


def _can_pack(convolution: nn.Conv2d) -> bool:
    if isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
        return False
    # Folding a batch norm with a negative variance gives weights that are NaN.
    if not all(values.isfinite().all() for values in convolution.parameters()):
        return False
    if convolution.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # Not float16: an overflow has to show up as NaN, which the fused ReLU would turn into 0.
    return convolution.weight.dtype == torch.float32


def _relu_after(node: fx.Node, model: fx.GraphModule) -> fx.Node | None:
    """Return the ReLU that is the only reader of a node, or None."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    is_relu = user.op == "call_module" and type(model.get_submodule(str(user.target))) is nn.ReLU
    return user if is_relu else None
