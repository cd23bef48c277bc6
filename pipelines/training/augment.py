"""Image transforms of a labelled set: timm's train transform and its eval transform.

Both return uint8; the model normalizes on its device. Random augmentation is seeded from (seed, epoch, id), because it
runs in Ray tasks, whose generators are not part of any checkpoint. An image is therefore augmented identically wherever
and whenever it is decoded.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.config.train import AugmentConfig
from pipelines.images.transform import EvalTransform
from pipelines.training.seeds import seed_generators


@dataclass(frozen=True)
class TrainPixels:
    """timm's train transform: random crop, flip, colour jitter and automatic augmentation.

    Attributes:
        input_size: Height and width of the result, in pixels.
        mean: Mean of each channel, in [0, 1]. Automatic augmentation fills empty areas with it.
        augment: Kinds and strengths of the augmentation.
        seed: Seed of the run.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    augment: AugmentConfig
    seed: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> NDArray[np.uint8]:
        """Augment an RGB image of any size for one epoch and id. Return height x width x 3, uint8."""
        seed_generators(self.seed, epoch, index)
        pixels: NDArray[np.uint8] = np.asarray(train_transform(self)(image))
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))


@dataclass(frozen=True)
class EvalPixels:
    """timm's eval transform.

    Attributes:
        transform: Eval transform of the model.
        max_pixels: Largest size, in pixels, that an image may be resized to.
    """

    transform: EvalTransform
    max_pixels: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> NDArray[np.uint8]:
        """Resize and crop an RGB image of any size. Return height x width x 3, uint8, the same in every epoch."""
        return self.transform.apply(image, self.max_pixels)


Pixels = TrainPixels | EvalPixels


@functools.lru_cache(maxsize=4)
def train_transform(pixels: TrainPixels) -> Callable[..., "object"]:
    """Build timm's train transform, from an RGB image to uint8 3 x height x width.

    Raises:
        AssertionError: timm does not know the automatic augmentation.
    """
    from timm.data.transforms_factory import create_transform

    augment = pixels.augment
    transform: Callable[..., object] = create_transform(
        input_size=pixels.input_size,
        is_training=True,
        use_prefetcher=True,  # returns uint8: normalization and random erasing run on the device
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=pixels.mean,
    )
    return transform
