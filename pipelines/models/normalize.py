"""From decoded pixels to a model's input, on the model's device."""

import torch
from torch import nn


class Normalizer(nn.Module):
    """The steps of torchvision's ToTensor and Normalize, in their order, for the same bits.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x height x width x 3, uint8, to batch x 3 x height x width, float32; channels-last already."""
        scaled = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        normalized: torch.Tensor = scaled.sub_(self.mean).div_(self.std)
        return normalized
