"""Convolutions on CPUs by the calls of oneDNN that torch's own compiler makes, without compiling."""

import torch
from torch import fx, nn


class PackedConv2d(nn.Module):
    """A convolution whose weights lie as oneDNN wants them, with the ReLU that follows it.

    `nn.Conv2d` has its weights rearranged for every batch, and a ReLU of its own is another pass over the memory. The
    bits are the same where oneDNN takes the same kernel for both, as in batches of 16; else rounding differs. Only for
    finite weights: oneDNN's ReLU makes 0 of NaN.

    Args:
        convolution: channels-last, in the precision to compute in.
        has_relu: whether a ReLU follows.
    """

    def __init__(self, convolution: nn.Conv2d, has_relu: bool) -> None:
        super().__init__()
        self.bias = convolution.bias
        self.has_relu = has_relu
        self._how = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        # Not a parameter: torch can neither cast nor pickle this layout.
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight.detach(), *self._how)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x channels x height x width, as `nn.Conv2d`."""
        output: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._packed, self.bias, *self._how, "relu" if self.has_relu else "none", [], ""
        )
        return output


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
        model.add_submodule(name, PackedConv2d(convolution, has_relu=relu is not None))
        node.target = name
        if relu is not None:
            relu.replace_all_uses_with(node)
            model.graph.erase_node(relu)
    model.delete_all_unused_submodules()
    model.recompile()


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
