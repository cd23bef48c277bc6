"""Photographs without a download: crops of the sample images of scikit-image and scikit-learn."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image

from pipelines.storage import uris
from pipelines.storage.filesystem import write_bytes

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
NUM_WRITERS = 16


def photographs() -> dict[str, Image.Image]:
    """Return the sample images in RGB, by name without suffix."""
    folder = Path(skimage.__file__).parent / "data"
    found = {Path(name).stem: Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS}
    samples = sklearn.datasets.load_sample_images()
    return found | {Path(name).stem: Image.fromarray(pixels) for name, pixels in zip(samples.filenames, samples.images)}


def crops(count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
    """Yield distinct random crops of the sample images in turn.

    Args:
        count: Number of crops.
        size: Width and height of each crop in pixels.
        seed: Seed of the random crops.

    Yields:
        Name, which includes the name of the sample image, and RGB crop.
    """
    random = np.random.default_rng(seed)
    sources = list(photographs().items())
    for index in range(count):
        name, source = sources[index % len(sources)]
        scale = random.uniform(0.5, 1.0)
        width, height = int(source.width * scale), int(source.height * scale)
        left = int(random.integers(0, source.width - width + 1))
        top = int(random.integers(0, source.height - height + 1))
        crop = source.crop((left, top, left + width, top + height))
        yield f"{index:05d}-{name}", crop.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_crops(uri: str, count: int, quality: int = 92, seed: int = 0, size: tuple[int, int] = (500, 375)) -> int:
    """Write crops as JPEG files under a URI, and return their total size in bytes."""

    def write(item: tuple[str, bytes]) -> int:
        name, content = item
        write_bytes(uris.join(uri, f"{name}.jpg"), content)
        return len(content)

    encoded = ((name, encode(image, quality=quality)) for name, image in crops(count, size, seed))
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return sum(pool.map(write, encoded))
