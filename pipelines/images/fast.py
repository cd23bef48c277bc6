"""Bytes to the model's input at several times the rate of timm's transform, and nearly the same pixels.

JPEG by libjpeg-turbo, scaled down in its inverse DCT where far more pixels are there than are needed; the rest of the
way by torch's uint8 resize (AVX2, antialiased). Everything else, and every JPEG that libjpeg-turbo refuses, is decoded
as `exact` does it, so that the same files fail, for the same reasons. `benchmarks/agreement.py` measures how near the
result is.
"""

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from pipelines.images.decode import decode_rgb
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
    resized = transform.resized_size(width, height, max_pixels)
    return width, height, _center_crop(_resize(pixels, resized, transform), transform)


def _decode(content: bytes, transform: EvalTransform, max_pixels: int) -> tuple[int, int, NDArray[np.uint8]]:
    try:
        return _decode_jpeg(content, transform, max_pixels)
    except ValueError:
        pass  # Pillow reads some of what is refused here, and says of the others what is wrong with them
    image = decode_rgb(content, max_pixels)
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


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int], transform: EvalTransform) -> NDArray[np.uint8]:
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    if transform.interpolation not in TORCH_FILTERS:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[transform.interpolation.upper()]))
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels-last in memory, which has a kernel of its own
    resized = interpolate(batch, size=(height, width), mode=transform.interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _center_crop(pixels: NDArray[np.uint8], transform: EvalTransform) -> NDArray[np.uint8]:
    crop_height, crop_width = transform.input_size
    height, width = pixels.shape[:2]
    if width < crop_width or height < crop_height:
        return np.asarray(transform.center_crop(Image.fromarray(pixels)))
    left, top = round((width - crop_width) / 2.0), round((height - crop_height) / 2.0)
    return pixels[top : top + crop_height, left : left + crop_width]
