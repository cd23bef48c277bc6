"""From decoded pixels to a model's input, on the model's device."""

import torch


class Normalizer:
    """The steps of torchvision's ToTensor and Normalize, in their order, for the same bits.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        device: where images go.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1) for values in (mean, std)
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x height x width x 3, uint8, to batch x 3 x height x width, float32; channels-last already."""
        scaled = images.to(self._device).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return scaled.sub_(self._mean).div_(self._std)
