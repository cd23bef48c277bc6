"""Sample of the input images that a model is quantized with."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.quantization_sample import evenly_spaced, read_sample
from pipelines.errors import RequestError
from tests.images.test_transform import IMAGENET

DECODE = FetchAndDecode(IMAGENET, 10**8, 10**8, "exact")


def rows(paths: list[str]) -> pa.Table:
    return pa.table({"id": pa.array(range(0, 10 * len(paths), 10), pa.int64()), "uri": paths})


@pytest.mark.parametrize(("num_rows", "count", "positions"), [(10, 3, [0, 4, 9]), (2, 256, [0, 1]), (1, 5, [0])])
def test_sample_is_spread_evenly_over_the_input(num_rows: int, count: int, positions: list[int]) -> None:
    assert evenly_spaced(num_rows, count).tolist() == positions


def test_unreadable_images_are_left_out_of_the_first_sample(photographs: Path) -> None:
    paths = [str(path) for path in sorted(photographs.iterdir())[:3]]
    sample = read_sample(rows([paths[0], "/absent.jpg", *paths[1:]]), DECODE)
    assert sample.ids == [0, 20, 30]
    assert sample.images.shape == (3, 224, 224, 3)
    assert np.array_equal(sample.images, read_sample(rows(paths), DECODE).images)


def test_pinned_sample_with_an_unreadable_image_is_refused(photographs: Path) -> None:
    path = str(next(photographs.iterdir()))
    assert read_sample(rows([path]), DECODE, is_pinned=True).ids == [0]
    with pytest.raises(
        RequestError, match=r"^cannot read 1 images that this output's .*, such as /absent.jpg: not_found"
    ):
        read_sample(rows([path, "/absent.jpg"]), DECODE, is_pinned=True)


def test_sample_without_a_readable_image_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^cannot read 2 images of the input, such as /absent.jpg: not_found"):
        read_sample(rows(["/absent.jpg", "/gone.jpg"]), DECODE)
