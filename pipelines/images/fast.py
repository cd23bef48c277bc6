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

from pipelines.images.decode import decode_by_pillow
from pipelines.images.jpeg import TORCH_FILTERS, read_size
from pipelines.images.transform import EvalTransform

# What the DCT leaves is resized once more: at half as many pixels again, the filter still decides how the result looks.
DCT_MARGIN = 1.5
# libjpeg-turbo knows others in eighths, without SIMD.
DCT_FACTORS = (8, 4, 2)

torch.set_num_threads(1)  # other images are the other cores' work


def preprocess_fast(content: bytes, transform: EvalTransform, max_pixels: int) -> tuple[int, int, NDArray[np.uint8]]:
    """Width and height of the source image, and height x width x 3 of the model's input size.

    Args:
        content: the bytes of a file.
        transform: the eval transform.
        max_pixels: largest image decoded, and largest size resized to.

    Raises:
        ItemError: as `exact` does.
    """
    width, height, pixels = _decode(content, transform, max_pixels)
    resized_width, resized_height = transform.resized_size(width, height, max_pixels)
    crop_height, crop_width = transform.input_size
    if transform.interpolation in TORCH_FILTERS and resized_width >= crop_width and resized_height >= crop_height:
        return width, height, _resize_part(pixels, resized_width, resized_height, transform)
    resized = _resize(pixels, (resized_width, resized_height), transform)
    return width, height, np.asarray(transform.center_crop(Image.fromarray(resized)))


def _decode(content: bytes, transform: EvalTransform, max_pixels: int) -> tuple[int, int, NDArray[np.uint8]]:
    try:
        return _decode_jpeg(content, transform, max_pixels)
    except ValueError:
        pass  # Pillow reads some of what is refused here, and says of the others what is wrong with them
    image = decode_by_pillow(content, max_pixels)
    return image.width, image.height, np.array(image)  # torch wants to be able to write to it


def _decode_jpeg(content: bytes, transform: EvalTransform, max_pixels: int) -> tuple[int, int, NDArray[np.uint8]]:
    """Width and height of the file, and its pixels at that size or at a half, a quarter or an eighth of it.

    Raises:
        ValueError: for the other decoder.
    """
    width, height = read_size(content, max_pixels)
    resized_width, resized_height = transform.resized_size(width, height, max_pixels)
    spare = min(width / resized_width, height / resized_height) / DCT_MARGIN
    factor = next((factor for factor in DCT_FACTORS if factor <= spare), 1)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        content, min_width=-(-width // factor), min_height=-(-height // factor), min_factor=factor
    )
    return width, height, pixels


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
