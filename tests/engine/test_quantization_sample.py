"""The images of the input that a model is quantized by."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.quantization_sample import every_nth, read_sample
from pipelines.errors import RequestError
from tests.images.test_transform import IMAGENET

DECODE = FetchAndDecode(IMAGENET, 10**8, 10**8, "exact")


def rows(paths: list[str]) -> pa.Table:
    return pa.table({"id": pa.array(range(0, 10 * len(paths), 10), pa.int64()), "uri": paths})


@pytest.mark.parametrize(("num_rows", "count", "positions"), [(10, 3, [0, 4, 9]), (2, 256, [0, 1]), (1, 5, [0])])
def test_a_sample_is_spread_over_the_input(num_rows: int, count: int, positions: list[int]) -> None:
    assert every_nth(num_rows, count).tolist() == positions


def test_what_cannot_be_had_is_left_out_of_a_first_sample(photographs: Path) -> None:
    paths = [str(path) for path in sorted(photographs.iterdir())[:3]]
    sample = read_sample(rows([paths[0], "/absent.jpg", *paths[1:]]), DECODE)
    assert sample.ids == [0, 20, 30]
    assert sample.images.shape == (3, 224, 224, 3)
    assert np.array_equal(sample.images, read_sample(rows(paths), DECODE).images)


def test_a_pinned_sample_is_had_whole_or_not_at_all(photographs: Path) -> None:
    path = str(next(photographs.iterdir()))
    assert read_sample(rows([path]), DECODE, is_pinned=True).ids == [0]
    with pytest.raises(RequestError, match=r"^1 images that this output's .* /absent.jpg among them: not_found"):
        read_sample(rows([path, "/absent.jpg"]), DECODE, is_pinned=True)


def test_without_one_image_nothing_is_quantized() -> None:
    with pytest.raises(RequestError, match=r"^2 images of the input cannot be had, /absent.jpg among them: not_found"):
        read_sample(rows(["/absent.jpg", "/gone.jpg"]), DECODE)
