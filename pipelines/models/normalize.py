"""Normalization of decoded pixels on the device of the model."""

import torch
from torch import nn


class Normalizer(nn.Module):
    """Module that performs the steps of torchvision's ToTensor and Normalize in the same order, bit for bit.

    Args:
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel, for values in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images.

        Args:
            images: Decoded images, batch x height x width x 3, uint8.

        Returns:
            Normalized images, batch x 3 x height x width, float32, in channels-last memory format.
        """
        scaled = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        normalized: torch.Tensor = scaled.sub_(self.mean).div_(self.std)
        return normalized
