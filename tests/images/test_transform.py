"""Comparison with timm's eval transform, byte for byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from cluster.local.photographs import photographs as sources
from pipelines.errors import ItemError
from pipelines.images.decode import decode_rgb
from pipelines.images.transform import EvalTransform
from tests.support.photographs import KINDS

IMAGENET = EvalTransform((224, 224), 0.875, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MAX_PIXELS = 10**8


def timms_pixels(image: Image.Image, transform: EvalTransform) -> np.ndarray[Any, Any]:
    theirs: Any = create_transform(
        input_size=(3, *transform.input_size),
        crop_pct=transform.crop_pct,
        crop_mode=transform.crop_mode,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        use_prefetcher=True,  # returns uint8
    )
    tensor: torch.Tensor = theirs(image)
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("input_size", [(224, 224), (288, 288), (160, 160), (224, 192)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_equals_timms_for_all_crops(crop_mode: str, input_size: tuple[int, int], crop_pct: float) -> None:
    transform = replace(IMAGENET, crop_mode=crop_mode, input_size=input_size, crop_pct=crop_pct)
    source = sources()["chelsea"]
    for size in ((451, 300), (300, 451), (256, 256), (90, 41), (33, 400), (225, 224), (1, 1)):
        image = source.resize(size)
        np.testing.assert_array_equal(transform.apply(image, MAX_PIXELS), timms_pixels(image, transform), str(size))


def test_equals_timms_for_photographs_of_any_size() -> None:
    random, source = np.random.default_rng(0), sources()["coffee"]
    for width, height in np.exp(random.uniform(3, 7, (150, 2))).astype(int).tolist():
        image = source.resize((width, height))
        for interpolation in ("bicubic", "bilinear", "lanczos"):
            transform = replace(IMAGENET, interpolation=interpolation)
            assert np.array_equal(transform.apply(image, MAX_PIXELS), timms_pixels(image, transform)), image.size


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"])
def test_equals_timms_for_all_filters(interpolation: str) -> None:
    transform = replace(IMAGENET, interpolation=interpolation)
    image = sources()["astronaut"]
    np.testing.assert_array_equal(transform.apply(image, MAX_PIXELS), timms_pixels(image, transform))


def test_equals_timms_for_every_kind_of_file(photographs: Path) -> None:
    paths = sorted(photographs.iterdir())
    assert {path.stem.partition("-")[2].partition("-")[2] for path in paths} >= set(KINDS)
    for path in paths:
        ours = IMAGENET.apply(decode_rgb(path.read_bytes(), MAX_PIXELS), MAX_PIXELS)
        theirs = timms_pixels(Image.open(path).convert("RGB"), IMAGENET)
        np.testing.assert_array_equal(ours, theirs, path.name)


def test_very_thin_image_is_rejected_before_it_is_resized() -> None:
    with pytest.raises(ItemError) as caught:
        IMAGENET.apply(Image.new("RGB", (1, 20_000)), MAX_PIXELS)
    assert caught.value.kind == "too_many_pixels"
