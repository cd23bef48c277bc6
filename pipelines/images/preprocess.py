"""From the bytes of a file to the model's input, in the modes of `preprocess.mode`."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.images.decode import decode_rgb
from pipelines.images.transform import EvalTransform

Mode = Literal["exact", "fast", "cuda"]


class Preprocessed(NamedTuple):
    """One image, ready for the model.

    Attributes:
        width: of the source image, in pixels.
        height: of the source image, in pixels.
        pixels: uint8 height x width x 3, of the model's input size.
    """

    width: int
    height: int
    pixels: NDArray[np.uint8]


Preprocess = Callable[[bytes], Preprocessed]
"""Raises ItemError where the bytes are no image, or not one that is taken."""


def make_preprocess(mode: Mode, transform: EvalTransform, max_pixels: int) -> Preprocess:
    """The way from bytes to pixels.

    Args:
        mode: of preprocessing; `cuda` does on the CPU what it leaves to it as `fast` does.
        transform: the eval transform.
        max_pixels: largest image decoded.
    """
    if mode != "exact":
        from pipelines.images.fast import preprocess_fast  # late: torch

        return lambda content: Preprocessed(*preprocess_fast(content, transform, max_pixels))

    def preprocess_exactly(content: bytes) -> Preprocessed:
        image = decode_rgb(content, max_pixels)
        return Preprocessed(image.width, image.height, transform.apply(image, max_pixels))

    return preprocess_exactly
