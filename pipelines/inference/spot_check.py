"""Spot check: recompute a sample of an output's rows on this machine, with the model and images of its run."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config.infer import InferConfig
from pipelines.engine.fetch_decode import make_decode
from pipelines.engine.options import PredictOptions
from pipelines.engine.quantization_sample import read_sample, refuse_unsupported_int8
from pipelines.errors import TRANSIENT_KINDS, ErrorKind, RequestError
from pipelines.inference.request import SAMPLED_IDS
from pipelines.inputs.manifest import Manifest
from pipelines.outputs.columns import ModelColumns, Tolerance

log = logging.getLogger(__name__)

BATCH_SIZE = 8
TOLERANCES = {
    "float32": Tolerance(prob=1e-4, embedding=1e-3),
    "bfloat16": Tolerance(0.05, 0.05),
    "float16": Tolerance(0.01, 0.01),
    "int8": Tolerance(0.1, 0.1),
}
# The JPEG decoder of a GPU rounds and upsamples chroma differently. It also fills in damaged images, which the CPU
# decoder refuses.
CUDA_TOLERANCE = Tolerance(0.1, 0.1)
CUDA_KINDS: tuple[ErrorKind, ...] = ("truncated", "corrupt")


def spot_check(
    record: dict[str, Any], manifest: Manifest, rows: pa.Table, columns: tuple[ModelColumns, ...]
) -> Iterator[str]:
    """Recompute rows, and compare them with those of the output.

    Args:
        record: Content of `_run.json` of the output.
        manifest: Manifest of the output.
        rows: Good rows of the output.
        columns: Columns of the output that the model computed.

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
        columns,
        use_gpu=False,
        max_pixels=config.preprocess.max_pixels_on_device,
    )
    is_cuda = config.preprocess.mode == "cuda"
    tolerance = CUDA_TOLERANCE if is_cuda else TOLERANCES[bundle.dtype]
    inconclusive_kinds = (*TRANSIENT_KINDS, "changed") + (CUDA_KINDS if is_cuda else ())
    rows = rows.sort_by("id")
    pinned = manifest.rows(rows["id"].to_numpy())
    recomputed = Predictor(prepare_bundle(bundle), options)(decode(pinned))
    for old, new in zip(rows.to_pylist(), recomputed.to_pylist()):
        if new["error_kind"] in inconclusive_kinds:
            log.warning("could not recompute row %d: %s", old["id"], new["error_message"])
            continue
        differences = (group.difference(old, new, tolerance) for group in columns)
        problem = new["error_kind"] or next(filter(None, differences), None)
        if problem:
            yield f"recomputed row {old['id']} differs: {problem}"
