"""Spot check: recompute a sample of an output's rows on this machine, with the model and images of its run."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config.infer import InferConfig
from pipelines.engine.fetch_decode import make_decode
from pipelines.engine.options import PredictOptions
from pipelines.engine.quantization_sample import read_sample, refuse_unsupported_int8
from pipelines.errors import TRANSIENT_KINDS, ErrorKind, RequestError
from pipelines.inference.request import SAMPLED_IDS
from pipelines.inputs.manifest import Manifest

log = logging.getLogger(__name__)

BATCH_SIZE = 8
# Differences that another machine, a GPU or another batch size may cause: absolute for probabilities, relative to the
# norm for embeddings.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.05), "float16": (0.01, 0.01), "int8": (0.1, 0.1)}
# The JPEG decoder of a GPU rounds and upsamples chroma differently. It also fills in damaged images, which the CPU
# decoder refuses.
CUDA_TOLERANCES = (0.1, 0.1)
CUDA_KINDS: tuple[ErrorKind, ...] = ("truncated", "corrupt")


def spot_check(record: dict[str, Any], manifest: Manifest, rows: pa.Table) -> Iterator[str]:
    """Recompute rows, and compare them with those of the output.

    Args:
        record: Content of `_run.json` of the output.
        manifest: Manifest of the output.
        rows: Good rows of the output.

    Yields:
        One line for each row that differs.

    Raises:
        RequestError: The model of the run cannot be loaded any more.
    """
    # Late: a check without a sample needs neither torch nor timm.
    from pipelines.engine.predict import Predictor
    from pipelines.models.resolve import prepare_bundle, resolve_bundle

    config = InferConfig.model_validate(record["config"])
    # The record contains every key, so it does not tell a default name from one that the user gave. The resolved name
    # is right in both cases.
    named = config.model.model_copy(update={"name": record["identity"]["model.name"]})
    config = config.model_copy(update={"model": named})
    try:
        bundle = resolve_bundle(config.model, config.preprocess)
        decode = make_decode(config, bundle.transform, manifest.reader)
        if bundle.dtype == "int8":
            from pipelines.models.cpu.int8 import quantize_bundle

            refuse_unsupported_int8(use_gpu=False, is_cluster=False)
            pinned = manifest.rows(np.array(record["identity"][SAMPLED_IDS], np.int64))
            images, _ = read_sample(pinned, decode, is_pinned=True)
            bundle = quantize_bundle(bundle, images, config.model.quantization)
    except RequestError as error:
        raise RequestError(f"{error}; use --sample.num_rows 0 to check the files without recomputing rows") from None
    if bundle.fingerprint != record["fingerprint"]:
        raise RequestError(
            "cannot recompute rows, because the weights or the libraries are no longer those of the run: use "
            "--sample.num_rows 0 to check the files only"
        )
    options = PredictOptions(
        BATCH_SIZE,
        record["identity"]["outputs.topk"],
        config.outputs.embedding,
        use_gpu=False,
        max_pixels=config.preprocess.max_pixels_on_device,
    )
    is_cuda = config.preprocess.mode == "cuda"
    tolerances = CUDA_TOLERANCES if is_cuda else TOLERANCES[bundle.dtype]
    inconclusive_kinds = (*TRANSIENT_KINDS, "changed") + (CUDA_KINDS if is_cuda else ())
    rows = rows.sort_by("id")
    pinned = manifest.rows(rows["id"].to_numpy())
    recomputed = Predictor(prepare_bundle(bundle), options)(decode(pinned))
    for old, new in zip(rows.to_pylist(), recomputed.to_pylist()):
        if new["error_kind"] in inconclusive_kinds:
            log.warning("could not recompute row %d: %s", old["id"], new["error_message"])
            continue
        problem = new["error_kind"] or _difference(old, new, *tolerances)
        if problem:
            yield f"recomputed row {old['id']} differs: {problem}"


def _difference(old: dict[str, Any], new: dict[str, Any], prob: float, embedding: float) -> str | None:
    if "prob" in old:
        before, after = _floats(old["prob"]), _floats(new["prob"])
        is_clear = len(after) < 2 or after[0] - after[1] > 2 * prob
        if (is_clear and old["index"][0] != new["index"][0]) or np.abs(before - after).max() > prob:
            return f"the probability of class {old['index'][0]} was {before[0]:.5f} and is now {after[0]:.5f}"
    if "embedding" in old:
        before, after = _floats(old["embedding"]), _floats(new["embedding"])
        distance = float(np.linalg.norm(before - after) / np.linalg.norm(after))
        if distance > embedding:
            return f"the embedding differs by {distance:.2g} of its norm"
    return None


def _floats(values: list[float]) -> NDArray[np.float64]:
    return np.array(values, np.float64)
