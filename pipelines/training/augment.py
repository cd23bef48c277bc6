"""The pixels of one image of a training set: timm's train transform, or its eval transform.

Both give uint8; the model normalizes on its device. Random changes are drawn from (seed, epoch, id): they happen in
Ray's tasks, whose generators no checkpoint holds, and are the same wherever and whenever the image is decoded.
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
    """Random crop, flip, colour and automatic augmentation, by timm's factory.

    Attributes:
        input_size: height and width, in pixels.
        mean: per channel, of values in [0, 1]; fills what automatic augmentation moves in.
        augment: what is drawn, and how much of it.
        seed: of the run.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    augment: AugmentConfig
    seed: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> NDArray[np.uint8]:
        """An RGB image of any size to uint8 height x width x 3, as drawn for this epoch and id."""
        seed_generators(self.seed, epoch, index)
        pixels: NDArray[np.uint8] = np.asarray(train_transform(self)(image))
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))


@dataclass(frozen=True)
class EvalPixels:
    """timm's eval transform.

    Attributes:
        transform: of the model.
        max_pixels: largest size resized to.
    """

    transform: EvalTransform
    max_pixels: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> NDArray[np.uint8]:
        """An RGB image of any size to uint8 height x width x 3, the same in every epoch."""
        return self.transform.apply(image, self.max_pixels)


Pixels = TrainPixels | EvalPixels


@functools.lru_cache(maxsize=4)
def train_transform(pixels: TrainPixels) -> Callable[..., "object"]:
    """Timm's transform, from an RGB image to uint8 3 x height x width.

    Raises:
        AssertionError: timm knows no such automatic augmentation.
    """
    from timm.data.transforms_factory import create_transform

    augment = pixels.augment
    transform: Callable[..., object] = create_transform(
        input_size=pixels.input_size,
        is_training=True,
        use_prefetcher=True,  # uint8; normalizing and erasing are the device's
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
