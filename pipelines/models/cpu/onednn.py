"""Convolutions on CPUs by the calls of oneDNN that torch's own compiler makes, without compiling."""

import torch
from torch import nn


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
