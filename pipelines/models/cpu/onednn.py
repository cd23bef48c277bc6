"""Convolutions on CPUs that call oneDNN the way torch's compiler does, but without compiling."""

import torch
from torch import nn


class PackedConv2d(nn.Module):
    """Convolution with weights in oneDNN's blocked layout, fused with the ReLU that follows it.

    `nn.Conv2d` reorders its weights for every batch, and a separate ReLU is another pass over the memory. Results are
    bit-for-bit the same if oneDNN chooses the same kernel for both, as for batches of 16; otherwise rounding differs.
    Weights have to be finite, because oneDNN's ReLU turns NaN into 0.

    Args:
        convolution: Convolution in channels-last format and the precision to compute in.
        has_relu: True if a ReLU follows.
    """

    def __init__(self, convolution: nn.Conv2d, has_relu: bool) -> None:
        super().__init__()
        self.bias = convolution.bias
        self.has_relu = has_relu
        self._geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        # Not a parameter, because torch can neither cast nor pickle this layout.
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight.detach(), *self._geometry)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve images, batch x channels x height x width, like `nn.Conv2d`."""
        output: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._packed, self.bias, *self._geometry, "relu" if self.has_relu else "none", [], ""
        )
        return output
