"""timm's eval transform, reimplemented on Pillow without torch.

`timm.data.transforms_factory.transforms_imagenet_eval` composes torchvision's transforms, which call Pillow's resize
and crop. Tests check that the result equals timm's, byte for byte.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import ItemError


class Preprocessed(NamedTuple):
    """Preprocessed image.

    Attributes:
        width: Width of the source image, in pixels.
        height: Height of the source image, in pixels.
        pixels: Input of the model: height x width x 3, uint8.
        is_clipped: True if the source is greyscale of more than 8 bits, most of which timm's transform clips to white.
    """

    width: int
    height: int
    pixels: NDArray[np.uint8]
    is_clipped: bool


@dataclass(frozen=True)
class EvalTransform:
    """timm's eval transform, with the fields of timm's `resolve_data_config`.

    Attributes:
        input_size: Height and width of the model's input, in pixels.
        crop_pct: Fraction of the resized image's side that the crop keeps.
        crop_mode: `center` (shortest edge fits), `squash` (both edges fit) or `border` (longest edge fits, padded).
        interpolation: Pillow's name of the filter, in lower case.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
    """

    input_size: tuple[int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
        """Resize and crop an image to height x width x 3, uint8. The model normalizes it on its device.

        Args:
            image: Image of mode RGB and any size.
            max_pixels: Size limit of the resized image, in pixels. Very long and thin images exceed it.

        Raises:
            ItemError: `too_many_pixels`.
        """
        width, height = self.resized_size(image.width, image.height, max_pixels)
        if self._can_crop_between_passes(image, width, height):
            image = self._crop_width(self._resize(image, width, image.height))
            width = image.width
        return np.asarray(self.center_crop(self._resize(image, width, height)))

    def _can_crop_between_passes(self, image: Image.Image, width: int, height: int) -> bool:
        """Return whether the width may be cropped between the two passes of Pillow's resize, which saves a tenth.

        Pillow resizes landscape images first in width, then in height, and rounds to bytes in between, so that the
        pixels stay the same if the aspect ratio is kept. `nearest` has only one pass.
        """
        is_shape_kept = self.crop_mode == "center" and image.width > image.height
        return (
            is_shape_kept and width > self.input_size[1] and height < image.height and self.interpolation != "nearest"
        )

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if (width, height) == image.size:
            return image
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def _crop_width(self, image: Image.Image) -> Image.Image:
        left = round((image.width - self.input_size[1]) / 2.0)
        return image.crop((left, 0, left + self.input_size[1], image.height))

    def resized_size(self, width: int, height: int, max_pixels: int) -> tuple[int, int]:
        """Return width and height of an image after the resize and before the center crop.

        Args:
            width: Width of the image, in pixels.
            height: Height of the image, in pixels.
            max_pixels: Size limit of the resized image, in pixels.

        Raises:
            ItemError: `too_many_pixels`.
        """
        resized_width, resized_height = self._resized_size(width, height)
        if resized_width * resized_height > max_pixels:
            raise ItemError(
                "too_many_pixels",
                f"{width} x {height} pixels resize to {resized_width} x {resized_height}, more than "
                f"preprocess.max_pixels = {max_pixels}",
            )
        return resized_width, resized_height

    def center_crop(self, image: Image.Image) -> Image.Image:
        """Crop the center of a resized image, padding it first if it is smaller than the model's input."""
        crop_height, crop_width = self.input_size
        image = self._pad_to(image, crop_width, crop_height)
        left = round((image.width - crop_width) / 2.0)
        top = round((image.height - crop_height) / 2.0)
        return image.crop((left, top, left + crop_width, top + crop_height))

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        crop_height, crop_width = self.input_size
        scale_height, scale_width = (math.floor(side / self.crop_pct) for side in self.input_size)
        if self.crop_mode == "squash":
            return scale_width, scale_height
        if self.crop_mode != "border" and crop_height == crop_width:
            # The long edge is truncated, not rounded, as in torchvision's Resize.
            if width <= height:
                return scale_width, int(scale_width * height / width)
            return int(scale_height * width / height), scale_height
        ratios = height / scale_height, width / scale_width
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(width / ratio), round(height / ratio)

    def _pad_to(self, image: Image.Image, crop_width: int, crop_height: int) -> Image.Image:
        width, height = max(image.width, crop_width), max(image.height, crop_height)
        if (width, height) == image.size:
            return image
        fill = tuple(round(255 * value) for value in self.mean) if self.crop_mode == "border" else (0, 0, 0)
        padded = Image.new("RGB", (width, height), fill)
        padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return padded
