"""Preprocessing at several times the rate of timm's transform, with nearly the same pixels.

libjpeg-turbo decodes JPEGs, and scales them down in the inverse DCT if they are much larger than needed. torch's uint8
resize (AVX2, antialiased) does the rest. All other files, and JPEGs that libjpeg-turbo rejects, are decoded as in mode
`exact`, so that the same files fail for the same reasons. `benchmarks/agreement.py` measures the difference.
"""

import math

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from pipelines.images.decode import decode_by_pillow, is_clipped_grey
from pipelines.images.jpeg import TORCH_FILTERS, has_coefficients_in_memory, read_size
from pipelines.images.memory import COEFFICIENT_BYTES_PER_PIXEL, SCALED_JPEG_BYTES_PER_PIXEL, Reservation
from pipelines.images.transform import EvalTransform, Preprocessed

# The DCT leaves at least 1.5 times the resized width and height, so that the final filter still determines the quality.
DCT_MARGIN = 1.5
# libjpeg-turbo supports other factors in eighths, but without SIMD.
DCT_FACTORS = (8, 4, 2)

torch.set_num_threads(1)  # the other cores work on other images


def preprocess_fast(content: bytes, transform: EvalTransform, max_pixels: int) -> Preprocessed:
    """Decode, resize and crop one image.

    Args:
        content: Bytes of a file.
        transform: Eval transform.
        max_pixels: Size limit, in pixels, of a decoded and of a resized image.

    Raises:
        ItemError: As in mode `exact`.
    """
    with Reservation() as memory:
        width, height, pixels, is_clipped = _decode(content, transform, max_pixels, memory)
        return Preprocessed(width, height, _resize_and_crop(width, height, pixels, transform, max_pixels), is_clipped)


def _resize_and_crop(
    width: int, height: int, pixels: NDArray[np.uint8], transform: EvalTransform, max_pixels: int
) -> NDArray[np.uint8]:
    """Resize and crop to the model's input.

    Args:
        width: Width of the source image.
        height: Height of the source image.
        pixels: Pixels of the source image, which the decoder may have scaled down.
        transform: Eval transform.
        max_pixels: Size limit of the resized image.
    """
    resized_width, resized_height = transform.resized_size(width, height, max_pixels)
    crop_height, crop_width = transform.input_size
    if transform.interpolation in TORCH_FILTERS and resized_width >= crop_width and resized_height >= crop_height:
        return _resize_cropped(pixels, resized_width, resized_height, transform)
    resized = _resize(pixels, (resized_width, resized_height), transform)
    return np.asarray(transform.center_crop(Image.fromarray(resized)))


def _decode(content: bytes, transform: EvalTransform, max_pixels: int, memory: Reservation) -> Preprocessed:
    """Return the size of the source image, and its pixels, which may be scaled down."""
    try:
        return _decode_jpeg(content, transform, max_pixels, memory)
    except ValueError:
        pass  # Pillow can decode some of these files, and finds the error of the others
    image = decode_by_pillow(content, max_pixels, memory)
    pixels = np.array(image)  # a copy, because torch needs a writable array
    return Preprocessed(image.width, image.height, pixels, is_clipped_grey(image))


def _decode_jpeg(content: bytes, transform: EvalTransform, max_pixels: int, memory: Reservation) -> Preprocessed:
    """Return the size of a JPEG, and its pixels at that size or at 1/2, 1/4 or 1/8 of it.

    Raises:
        ValueError: Pillow has to decode the file.
    """
    width, height = read_size(content, max_pixels)
    resized_width, resized_height = transform.resized_size(width, height, max_pixels)
    spare = min(width / resized_width, height / resized_height) / DCT_MARGIN
    factor = next((factor for factor in DCT_FACTORS if factor <= spare), 1)
    per_pixel = SCALED_JPEG_BYTES_PER_PIXEL / factor**2
    if has_coefficients_in_memory(content):
        per_pixel += COEFFICIENT_BYTES_PER_PIXEL
    memory.acquire(width * height * per_pixel)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        content, min_width=-(-width // factor), min_height=-(-height // factor), min_factor=factor
    )
    return Preprocessed(width, height, pixels, is_clipped=False)


def _resize_cropped(
    pixels: NDArray[np.uint8], resized_width: int, resized_height: int, transform: EvalTransform
) -> NDArray[np.uint8]:
    """Resize and crop, without resizing the part below and to the right of the crop.

    The part above and to the left is resized, because dropping it would shift the sampling grid against `exact`.
    """
    height, width = pixels.shape[:2]
    crop_height, crop_width = transform.input_size
    top, left = round((resized_height - crop_height) / 2.0), round((resized_width - crop_width) / 2.0)
    num_rows = _num_needed(height, height / resized_height, top + crop_height)
    num_columns = _num_needed(width, width / resized_width, left + crop_width)
    resized = torch.from_numpy(pixels[:num_rows, :num_columns])
    if (resized_width, resized_height) != (width, height):
        # Adding the batch axis before the permutation makes the tensor channels-last. torch has a faster kernel for it,
        # which also returns channels-last memory.
        resized = interpolate(
            resized[None].permute(0, 3, 1, 2),
            scale_factor=(_factor(height, resized_height), _factor(width, resized_width)),
            mode=transform.interpolation,
            antialias=True,
            recompute_scale_factor=False,
        )[0].permute(1, 2, 0)
    return resized.numpy()[top : top + crop_height, left : left + crop_width]


def _num_needed(num_pixels: int, scale: float, last: int) -> int:
    """Return how many pixels along one axis of the source are needed for the result up to its pixel `last`."""
    # Bicubic reads two pixels beyond the last, in the coarser of the two grids. One more covers the rounding.
    return min(num_pixels, math.ceil((last + 1) * scale + 2 * max(1.0, scale)) + 1)


def _factor(num_pixels: int, num_resized: int) -> float:
    # Slightly larger, because torch rounds the size of the result down.
    return num_resized / num_pixels * (1 + 1e-9)


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int], transform: EvalTransform) -> NDArray[np.uint8]:
    """Resize the whole image with Pillow, for filters that torch lacks and crops that extend beyond the image."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[transform.interpolation.upper()]))
