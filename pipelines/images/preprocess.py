"""Preprocessing of a file's bytes to the model's input, in the modes of `preprocess.mode`."""

from collections.abc import Callable
from typing import Literal

from pipelines.images.decode import decoded, is_clipped_grey
from pipelines.images.transform import EvalTransform, Preprocessed

Mode = Literal["exact", "fast", "cuda"]


Preprocess = Callable[[bytes], Preprocessed]
"""Function from the bytes of a file to the model's input. Raises ItemError if they cannot be decoded."""


def make_preprocess(mode: Mode, transform: EvalTransform, max_pixels: int) -> Preprocess:
    """Return the preprocessing function of a mode.

    Args:
        mode: Mode of preprocessing. For images that stay on the CPU, `cuda` is the same as `fast`.
        transform: Eval transform.
        max_pixels: Size limit of the image, in pixels.
    """
    if mode != "exact":
        from pipelines.images.fast import preprocess_fast  # late: torch

        return lambda content: preprocess_fast(content, transform, max_pixels)

    def preprocess_exactly(content: bytes) -> Preprocessed:
        with decoded(content, max_pixels) as image:
            pixels = transform.apply(image, max_pixels)
            return Preprocessed(image.width, image.height, pixels, is_clipped_grey(image))

    return preprocess_exactly
