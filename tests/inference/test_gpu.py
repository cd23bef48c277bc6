"""A replica on a GPU. Not run without one."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.images.preprocess import Mode
from pipelines.images.transform import EvalTransform
from pipelines.inference import pixels
from pipelines.inference.fetch_decode import FetchAndDecode
from pipelines.inference.predict import Predictor
from pipelines.inference.replica import PredictOptions
from pipelines.models.resolve import prepare_bundle, resolve_bundle

pytestmark = pytest.mark.gpu
BATCH_SIZE = 16


def read(photographs: Path, transform: EvalTransform, mode: Mode = "exact") -> pa.Table:
    paths = [str(path) for path in sorted(photographs.iterdir())]
    decode = FetchAndDecode(transform, 10**8, 10**8, mode)
    return decode(pa.table({"id": np.arange(len(paths)), "uri": paths}))


@pytest.mark.parametrize("name", ["ecaresnet50d", "ecaresnet50d_pruned"])  # one of each layout
def test_a_gpu_gives_the_rows_of_a_cpu_whatever_its_threads(
    name: str, photographs: Path, telling_weights: Callable[[str], Path]
) -> None:
    bundle = prepare_bundle(
        resolve_bundle(ModelConfig(name=name, weights=str(telling_weights(name))), PreprocessConfig())
    )
    images = read(photographs, bundle.transform)
    expected = Predictor(copy.deepcopy(bundle), PredictOptions(BATCH_SIZE, 5, True, use_gpu=False))(images)
    on_gpu = Predictor(bundle, PredictOptions(BATCH_SIZE, 5, True, use_gpu=True))
    with ThreadPoolExecutor(2) as threads:
        many = list(threads.map(on_gpu, [images] * 8))
    assert all(rows.equals(many[0]) for rows in many)
    there, here = (np.stack(rows["embedding"].to_numpy()) for rows in (many[0], expected))
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=1e-3)
    assert many[0]["index"].to_pylist() == expected["index"].to_pylist()


def test_a_gpu_decodes_nearly_the_same_pixels_whatever_else_it_does(
    photographs: Path, telling_weights: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(telling_weights("ecaresnet50d"))
    bundle = prepare_bundle(resolve_bundle(ModelConfig(name="ecaresnet50d", weights=weights), PreprocessConfig()))
    options = PredictOptions(BATCH_SIZE, 5, True, use_gpu=True, max_pixels=10**8)
    encoded, exact = read(photographs, bundle.transform, "cuda"), read(photographs, bundle.transform)
    predict = Predictor(bundle, options)
    there, here = predict(encoded), predict(exact)
    assert there["error_kind"].equals(here["error_kind"])
    ours, theirs = (np.stack(rows["embedding"].to_numpy()) for rows in (there, here))
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert np.median(cosine) > 0.999
    monkeypatch.setattr(pixels, "MAX_PIXELS_IN_HAND", 300_000)  # in several groups
    with ThreadPoolExecutor(2) as threads:
        assert all(rows.equals(there) for rows in threads.map(predict, [encoded] * 16))
