"""Handwritten digits as image files: real images that a small network learns in two minutes on two cores.

The images are scikit-learn's 1,797 digits of 8 x 8 pixels (UCI's optical recognition of handwritten digits), one file
for each.
"""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sklearn.datasets
from PIL import Image

from pipelines.storage import uris
from pipelines.storage.filesystem import write_bytes

SIZE = 32  # the model halves the size five times, down to one pixel
HELD_OUT_EVERY = 3
LARGEST_VALUE = 16
NUM_WRITERS = 16


def write_digits(train_uri: str, held_out_uri: str) -> tuple[int, int]:
    """Write the digits as PNG files into folders named after the class. Every third image is held out.

    Returns:
        Number of files under `train_uri` and under `held_out_uri`.
    """
    images, targets = sklearn.datasets.load_digits(return_X_y=True)
    contents: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
    for index, (values, target) in enumerate(zip(images, targets)):
        is_held_out = index % HELD_OUT_EVERY == 0
        contents[is_held_out][f"{target}/{index:04}.png"] = _png(values.reshape(8, 8))
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        for uri, files in zip((train_uri, held_out_uri), contents):
            list(pool.map(write_bytes, [uris.join(uri, name) for name in files], files.values()))
    return len(contents[0]), len(contents[1])


def _png(values: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> bytes:
    pixels = (values * 255 / LARGEST_VALUE).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()
