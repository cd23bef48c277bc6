"""Photographs in all common file formats and pixel modes."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.local.photographs import crops

# Suffix, Pillow mode, and options of `save`.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("jpg", "RGB", {"quality": 90}),
    "jpeg-progressive": ("jpg", "RGB", {"quality": 85, "progressive": True}),
    "jpeg-grey": ("jpg", "L", {"quality": 90}),
    "jpeg-cmyk": ("jpg", "CMYK", {"quality": 95}),
    "png": ("png", "RGB", {}),
    "png-grey": ("png", "L", {}),
    "png-grey-alpha": ("png", "LA", {}),
    "png-palette": ("png", "P", {}),
    "png-alpha": ("png", "RGBA", {}),
    "png-16": ("png", "I;16", {}),
    "png-1": ("png", "1", {}),
    "webp": ("webp", "RGB", {"quality": 85}),
    "webp-lossless-alpha": ("webp", "RGBA", {"lossless": True}),
    "gif": ("gif", "P", {}),
    "gif-animated": ("gif", "P", {"save_all": True}),
    "bmp": ("bmp", "RGB", {}),
    "bmp-palette": ("bmp", "P", {}),
    "tiff": ("tiff", "RGB", {"compression": "tiff_lzw"}),
    "tiff-grey": ("tiff", "L", {}),
    "tiff-16": ("tiff", "I;16", {}),
    "tiff-cmyk": ("tiff", "CMYK", {}),
    "tiff-alpha": ("tiff", "RGBA", {"compression": "tiff_deflate"}),
}
# Landscape, portrait, square, smaller than the model's input, very wide, and with odd side lengths.
SIZES = ((500, 375), (333, 500), (256, 256), (120, 90), (700, 130), (301, 227), (224, 224))


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Write distinct crops as files of all kinds in turn. The file names contain the kind."""
    kinds = list(KINDS)
    paths = []
    for index, (name, crop) in enumerate(crops(count, size=(640, 480), seed=7)):
        kind = kinds[index % len(kinds)]
        suffix, mode, options = KINDS[kind]
        image = as_mode(crop.resize(SIZES[index % len(SIZES)], Image.Resampling.LANCZOS), mode)
        path = folder / f"{name}-{kind}.{suffix}"
        extra = dict(options)
        if extra.get("save_all"):
            extra["append_images"] = [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        image.save(path, **extra)
        paths.append(path)
    return paths


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an RGB image to another Pillow mode.

    Alpha decreases from left to right, and 16-bit images use the full range.
    """
    if mode == "I;16":
        grey = np.asarray(image.convert("L"), dtype=np.uint16)
        return Image.fromarray(grey * 257)
    converted = image.convert(mode)
    if mode in ("RGBA", "LA"):
        ramp = np.tile(np.linspace(255, 0, image.width, dtype=np.uint8), (image.height, 1))
        converted.putalpha(Image.fromarray(ramp))
    return converted
