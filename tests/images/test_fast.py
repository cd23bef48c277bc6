"""`preprocess.mode=fast` compared with `exact`: nearly the same pixels, and the same failures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from cluster.local.photographs import encode
from cluster.local.photographs import photographs as sources
from pipelines.errors import ItemError
from pipelines.images import fast
from pipelines.images.preprocess import Mode, make_preprocess
from pipelines.images.transform import EvalTransform
from tests.support.broken import broken_files, strange_files

IMAGENET = EvalTransform((224, 224), 0.875, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MAX_PIXELS = 10**8
MODES: tuple[Mode, ...] = ("exact", "fast")


def difference(content: bytes, transform: EvalTransform = IMAGENET) -> float:
    """Return the mean absolute difference between `fast` and `exact`, for values up to 255."""
    exact, fast = (make_preprocess(mode, transform, MAX_PIXELS)(content) for mode in MODES)
    assert (fast.width, fast.height) == (exact.width, exact.height)
    assert fast.pixels.shape == exact.pixels.shape == (*transform.input_size, 3)
    assert fast.pixels.dtype == np.uint8
    assert len(fast.pixels.tobytes()) == exact.pixels.size
    return float(np.abs(fast.pixels.astype(int) - exact.pixels).mean())


def test_every_kind_of_file_is_close_to_exact(photographs: Path) -> None:
    differences = {path.name: difference(path.read_bytes()) for path in sorted(photographs.iterdir())}
    assert max(differences.values()) < 0.5, differences


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (1000, 800), (2400, 1800), (90, 41), (33, 400), (1, 1)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_every_size_and_crop_is_close_to_exact(size: tuple[int, int], crop_mode: str) -> None:
    content = encode(sources()["coffee"].resize(size), quality=92)
    # Scaling in the DCT makes edges slightly sharper or softer.
    assert difference(content, replace(IMAGENET, crop_mode=crop_mode)) < 2


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (451, 300), (2000, 1500), (224, 224), (256, 900), (90, 41)])
def test_resize_of_the_needed_part_equals_the_full_resize(size: tuple[int, int]) -> None:
    pixels = np.array(sources()["coffee"].resize(size))
    width, height = IMAGENET.resized_size(*size, MAX_PIXELS)
    whole = interpolate(
        torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), size=(height, width), mode="bicubic", antialias=True
    )
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = whole[0].permute(1, 2, 0).numpy()[top : top + 224, left : left + 224]
    off = np.abs(fast._resize_cropped(pixels, width, height, IMAGENET).astype(int) - expected)
    assert off.max() <= 1  # rounding of values halfway between two integers
    assert (off > 0).mean() < 0.001


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest", "lanczos"])
def test_every_filter_is_close_to_exact(interpolation: str) -> None:
    content = encode(sources()["coffee"], quality=92)
    assert difference(content, replace(IMAGENET, interpolation=interpolation)) < 0.5


def test_large_photographs_are_scaled_in_the_dct(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    resize = fast._resize_cropped

    def spy(pixels: NDArray[np.uint8], width: int, height: int, transform: EvalTransform) -> NDArray[np.uint8]:
        decoded.append(pixels.shape)
        return resize(pixels, width, height, transform)

    monkeypatch.setattr(fast, "_resize_cropped", spy)
    for size in ((400, 400), (800, 800), (1600, 1600)):
        fast.preprocess_fast(encode(sources()["coffee"].resize(size)), IMAGENET, MAX_PIXELS)
    assert decoded == [(400, 400, 3), (400, 400, 3), (400, 400, 3)]


@pytest.mark.parametrize("name", [name for name, (content, _) in broken_files().items() if content])
def test_broken_file_fails_as_in_mode_exact(name: str) -> None:
    content, kinds = broken_files()[name]
    with pytest.raises(ItemError) as caught:
        make_preprocess("fast", IMAGENET, MAX_PIXELS)(content)
    assert caught.value.kind in kinds


@pytest.mark.parametrize("name", strange_files())
def test_strange_file_has_the_same_outcome_as_in_mode_exact(name: str) -> None:
    assert outcome("fast", strange_files()[name]) == outcome("exact", strange_files()[name])


def outcome(mode: Mode, content: bytes) -> tuple[int, int] | str:
    try:
        done = make_preprocess(mode, IMAGENET, MAX_PIXELS)(content)
    except ItemError as error:
        return error.kind
    return done.width, done.height
