"""A request, resolved: every question that a config leaves open, answered on the driver before anything is computed."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from pipelines.config.infer import InferConfig
from pipelines.engine.fetch_decode import FetchAndDecode
from pipelines.engine.plan import ComputePlan
from pipelines.engine.quantization_sample import Sample, every_nth, read_sample
from pipelines.engine.replica import PredictOptions
from pipelines.errors import TRANSIENT_KINDS, ErrorKind, RequestError
from pipelines.inputs.listing import Listing, list_objects
from pipelines.inputs.manifest import ManifestInfo, find_manifest, read_manifest_rows, write_manifest
from pipelines.models.bundle import ModelFacts
from pipelines.models.process import ModelProcess
from pipelines.outputs import run_record
from pipelines.outputs.contents import Done, find_done, is_as_recorded
from pipelines.outputs.file_names import list_files
from pipelines.outputs.lease import Lease
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, translate_storage_errors

log = logging.getLogger(__name__)

SAMPLED_IDS = "model.quantization.sampled_ids"
# What may differ between two runs on one output: where and how fast it is computed, and what the fingerprint holds.
FREE = (
    "output",
    "compute",
    "failure",
    "model",
    "preprocess.mode",
    "preprocess.image_size",
    "preprocess.use_test_size",
)
RETRIED_KINDS: dict[str, tuple[ErrorKind, ...]] = {
    "none": (),
    "transient": TRANSIENT_KINDS,
    "all": get_args(ErrorKind),
}


@dataclass(frozen=True)
class Request:
    """A config whose every question is answered.

    Attributes:
        config: with normalized URIs.
        model: what it is, without its weights.
        manifest: the pinned inputs.
        topk: classes per row.
        identity: what another run must share to go on in the same output.
        done: what the output holds already.
        is_finished: whether it holds everything, and nothing is to be retried or mended.
    """

    config: InferConfig
    model: ModelFacts
    manifest: ManifestInfo
    topk: int
    identity: dict[str, Any]
    done: Done
    is_finished: bool

    @property
    def num_todo(self) -> int:
        """Inputs without a row yet."""
        return self.done.ids.size - len(self.done.ids)

    @property
    def num_done(self) -> int:
        """Inputs that had a row when the run began."""
        return len(self.done.ids)


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes, and what an earlier run left there.

    Attributes:
        config: with normalized URIs.
        found: `_run.json` of an earlier run.
        manifest: its inputs, where it came as far.
        is_complete: whether it ended well.
    """

    config: InferConfig
    found: dict[str, Any] | None
    manifest: ManifestInfo | None
    is_complete: bool


def find_places(config: InferConfig) -> Places:
    """Look at the input and the output.

    Raises:
        RequestError: the input does not exist, one of them cannot be used, or the output lies inside the input.
    """
    input_uri, output_uri = uris.normalize(config.input.uri), uris.normalize(config.output.uri)
    uris.refuse_overlap(output_uri, {"input.uri": input_uri})
    output = config.output.model_copy(update={"uri": output_uri})
    config = config.model_copy(update={"input": config.input.model_copy(update={"uri": input_uri}), "output": output})
    found = run_record.find_run(output_uri) if exists(output_uri) else None
    manifest = find_manifest(output_uri) if found else None
    if found and manifest is None and (files := list_files(output_uri)):
        raise RequestError(
            f"{output_uri} holds {files[0]} but no _manifest/manifest.json, without which its ids mean nothing: "
            "restore the manifest from a copy, or write to a new output"
        )
    if manifest is None and not exists(input_uri):
        raise RequestError(f"no input: nothing lies under {input_uri}")
    return Places(config, found, manifest, manifest is not None and run_record.is_complete(output_uri))


def resolve_request(places: Places, process: ModelProcess, lease: Lease) -> Request:
    """Answer every other question, cheapest first; then take the output, and pin the manifest.

    Raises:
        RequestError: one of the answers is no.
    """
    config, found, manifest = places.config, places.found, places.manifest
    output_uri = config.output.uri
    # Meanwhile: weights that are wrong are refused without waiting for what may be minutes.
    lister = ThreadPoolExecutor(1)
    listed = None if manifest else lister.submit(list_objects, config.input.uri, config.input.exclude)
    lister.shutdown(wait=False)
    model = process.facts()
    topk = resolve_topk(config, model)
    # Listed before the first write, so that a request without input leaves nothing behind; never again.
    listing = listed.result() if listed else None
    uris.refuse_linked_overlap(output_uri, "input.uri", listing.linked if listing else {})
    sampled_ids: list[int] | None = None
    if model.dtype == "int8":
        images, sampled_ids = _sample(config, model, manifest, listing, _sampled_ids(found))
        model = process.quantized_facts(images)
    identity = identify(config, model, topk, sampled_ids)
    if found:
        run_record.refuse_other_run(output_uri, found, identity)
    with translate_storage_errors("write to", output_uri):
        lease.acquire()
    run_record.refuse_if_changed(output_uri, found)
    lease.confirm()
    if not places.is_complete:
        run_record.write_run(output_uri, describe_run(config, model, identity, found or {}))
    epoch = lease.fence.epoch
    if listing is not None:
        manifest = write_manifest(output_uri, config.input.uri, config.input.exclude, listing, epoch)
    assert manifest is not None
    with translate_storage_errors("read", output_uri):
        done = find_done(output_uri, manifest.num_inputs, epoch, RETRIED_KINDS[config.failure.retry])
        is_finished = places.is_complete and is_as_recorded(output_uri, done)
    if places.is_complete and not is_finished and config.failure.retry == "none":
        log.info("%s is finished, but its files are not those of its record: mending it", output_uri)
    return Request(config, model, manifest, topk, identity, done, is_finished)


def resolve_topk(config: InferConfig, model: ModelFacts) -> int:
    """Classes per row: what was asked for, or all that the model has.

    Raises:
        RequestError: the user asked for more than it has.
    """
    if config.outputs.topk <= model.num_classes:
        return config.outputs.topk
    if not model.num_classes:
        raise RequestError(
            f"the weights {config.model.weights} have no classifier, so there are no classes to write; "
            "set outputs.topk to 0 for embeddings alone"
        )
    if config.outputs.is_set("topk"):
        raise RequestError(f"outputs.topk = {config.outputs.topk}, but the model has {model.num_classes} classes")
    return model.num_classes


def _sampled_ids(found: dict[str, Any] | None) -> list[int] | None:
    ids: list[int] | None = found["identity"].get(SAMPLED_IDS) if found else None
    return ids


def _sample(
    config: InferConfig,
    model: ModelFacts,
    manifest: ManifestInfo | None,
    listing: Listing | None,
    pinned_ids: list[int] | None,
) -> Sample:
    if manifest:
        return sample_of_manifest(config, model, manifest, pinned_ids)
    assert listing is not None
    positions = every_nth(listing.table.num_rows, config.model.quantization.num_images)
    rows = pa.table({"id": positions, "uri": listing.table["uri"].take(positions).combine_chunks()})
    return read_sample(rows, make_decode(config, model))


def sample_of_manifest(
    config: InferConfig, model: ModelFacts, manifest: ManifestInfo, pinned_ids: list[int] | None
) -> Sample:
    """Images to quantize by: those that each run on an output takes.

    Args:
        config: with normalized URIs.
        model: what it is.
        manifest: of the output.
        pinned_ids: that the first run took.

    Raises:
        RequestError: they cannot be had.
    """
    chosen = every_nth(manifest.num_inputs, config.model.quantization.num_images)
    ids = chosen if pinned_ids is None else np.array(pinned_ids, np.int64)
    rows = read_manifest_rows(config.output.uri, ids, manifest)
    return read_sample(rows, make_decode(config, model), is_pinned=pinned_ids is not None)


def make_decode(config: InferConfig, model: ModelFacts) -> FetchAndDecode:
    """The first stage of a run."""
    preprocess = config.preprocess
    return FetchAndDecode(model.transform, config.input.max_bytes, preprocess.max_pixels, preprocess.mode)


def make_options(config: InferConfig, plan: ComputePlan, topk: int) -> PredictOptions:
    """How the replicas of a run predict."""
    use_gpu, num_threads = plan.num_gpus_per_worker > 0, plan.num_threads_per_worker
    compile, max_pixels = config.model.compile, config.preprocess.max_pixels_on_device
    return PredictOptions(plan.batch_size, topk, config.outputs.embedding, use_gpu, num_threads, compile, max_pixels)


def identify(config: InferConfig, model: ModelFacts, topk: int, sampled_ids: list[int] | None) -> dict[str, Any]:
    """Return what has to be the same for two runs to share an output."""
    sampled = {} if sampled_ids is None else {SAMPLED_IDS: sampled_ids}
    resolved = {
        "model.name": model.name,
        "fingerprint": model.fingerprint,
        run_record.LABEL_NAMES_KEY: run_record.label_names_digest(model.label_names),
        "outputs.topk": topk,
    }
    return run_record.identity_of(config, FREE, resolved | sampled)


def describe_run(
    config: InferConfig, model: ModelFacts, identity: dict[str, Any], earlier: dict[str, Any]
) -> dict[str, Any]:
    """What `_run.json` says: the resolved config and what came of it, with the summary where there is one."""
    record = {
        "config": config.model_dump(),
        "identity": identity,
        "fingerprint": model.fingerprint,
        "transform": asdict(model.transform),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": list(model.label_names),
    }
    return record | ({"summary": earlier["summary"]} if "summary" in earlier else {})
