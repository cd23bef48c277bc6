"""Bytes to the model's input at several times the rate of timm's transform, and nearly the same pixels.

JPEG by libjpeg-turbo, scaled down in its inverse DCT where far more pixels are there than are needed; the rest of the
way by torch's uint8 resize (AVX2, antialiased). Everything else, and every JPEG that libjpeg-turbo refuses, is decoded
as `exact` does it, so that the same files fail, for the same reasons. `benchmarks/agreement.py` measures how near the
result is.
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

# What the DCT leaves is resized once more: at half as many pixels again, the filter still decides how the result looks.
DCT_MARGIN = 1.5
# libjpeg-turbo knows others in eighths, without SIMD.
DCT_FACTORS = (8, 4, 2)

torch.set_num_threads(1)  # other images are the other cores' work


def preprocess_fast(content: bytes, transform: EvalTransform, max_pixels: int) -> Preprocessed:
    """Decode, resize and crop one image.

    Args:
        content: The bytes of a file.
        transform: The eval transform.
        max_pixels: Largest image decoded, and largest size resized to.

    Raises:
        ItemError: As `exact` does.
    """
    with Reservation() as memory:
        width, height, pixels, is_clipped = _decode(content, transform, max_pixels, memory)
        return Preprocessed(width, height, _resize_and_crop(width, height, pixels, transform, max_pixels), is_clipped)


def _resize_and_crop(
    width: int, height: int, pixels: NDArray[np.uint8], transform: EvalTransform, max_pixels: int
) -> NDArray[np.uint8]:
    """Return the model's input, made of the pixels of an image of `width` x `height` that may be scaled down."""
    resized_width, resized_height = transform.resized_size(width, height, max_pixels)
    crop_height, crop_width = transform.input_size
    if transform.interpolation in TORCH_FILTERS and resized_width >= crop_width and resized_height >= crop_height:
        return _resize_part(pixels, resized_width, resized_height, transform)
    resized = _resize(pixels, (resized_width, resized_height), transform)
    return np.asarray(transform.center_crop(Image.fromarray(resized)))


def _decode(content: bytes, transform: EvalTransform, max_pixels: int, memory: Reservation) -> Preprocessed:
    """Return width and height of the file, and its pixels, which may be scaled down."""
    try:
        return _decode_jpeg(content, transform, max_pixels, memory)
    except ValueError:
        pass  # Pillow reads some of what is refused here, and says of the others what is wrong with them
    image = decode_by_pillow(content, max_pixels, memory)
    pixels = np.array(image)  # a copy: torch wants to be able to write to it
    return Preprocessed(image.width, image.height, pixels, is_clipped_grey(image))


def _decode_jpeg(content: bytes, transform: EvalTransform, max_pixels: int, memory: Reservation) -> Preprocessed:
    """Return width and height of the file, and its pixels at that size or at a half, a quarter or an eighth of it.

    Raises:
        ValueError: Pillow has to decode it.
    """
    width, height = read_size(content, max_pixels)
    resized_width, resized_height = transform.resized_size(width, height, max_pixels)
    spare = min(width / resized_width, height / resized_height) / DCT_MARGIN
    factor = next((factor for factor in DCT_FACTORS if factor <= spare), 1)
    per_pixel = SCALED_JPEG_BYTES_PER_PIXEL / factor**2
    if has_coefficients_in_memory(content):
        per_pixel += COEFFICIENT_BYTES_PER_PIXEL
    memory.take(width * height * per_pixel)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        content, min_width=-(-width // factor), min_height=-(-height // factor), min_factor=factor
    )
    return Preprocessed(width, height, pixels, is_clipped=False)


def _resize_part(
    pixels: NDArray[np.uint8], resized_width: int, resized_height: int, transform: EvalTransform
) -> NDArray[np.uint8]:
    """Resize, but leave out what lies below and to the right of the crop, and cut the crop out.

    What lies above and to the left stays: without it, the samples would fall between those of `exact`.
    """
    height, width = pixels.shape[:2]
    crop_height, crop_width = transform.input_size
    top, left = round((resized_height - crop_height) / 2.0), round((resized_width - crop_width) / 2.0)
    num_rows = _num_needed(height, height / resized_height, top + crop_height)
    num_columns = _num_needed(width, width / resized_width, left + crop_width)
    resized = torch.from_numpy(pixels[:num_rows, :num_columns])
    if (resized_width, resized_height) != (width, height):
        # The batch comes first, before its axes are permuted: only so does torch see channels-last memory, for which it
        # has the faster kernel, and which it gives back.
        resized = interpolate(
            resized[None].permute(0, 3, 1, 2),
            scale_factor=(_factor(height, resized_height), _factor(width, resized_width)),
            mode=transform.interpolation,
            antialias=True,
            recompute_scale_factor=False,
        )[0].permute(1, 2, 0)
    return resized.numpy()[top : top + crop_height, left : left + crop_width]


def _num_needed(num_pixels: int, scale: float, last: int) -> int:
    """Pixels of one side of the source that a side of the result is made from, up to its pixel `last`."""
    # Bicubic reads two pixels beyond, of the coarser of the two grids; one more for what is rounded.
    return min(num_pixels, math.ceil((last + 1) * scale + 2 * max(1.0, scale)) + 1)


def _factor(num_pixels: int, num_resized: int) -> float:
    # A little more: torch rounds the size of the result down.
    return num_resized / num_pixels * (1 + 1e-9)


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int], transform: EvalTransform) -> NDArray[np.uint8]:
    """All of it, by Pillow, for filters that torch lacks and for crops that reach beyond the image."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[transform.interpolation.upper()]))
