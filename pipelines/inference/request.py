"""Resolved request of `infer`: the driver settles everything that the config leaves open before computing starts."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from pipelines.config.infer import InferConfig
from pipelines.config.sections import OutputsConfig
from pipelines.engine.engine import Engine
from pipelines.errors import TRANSIENT_KINDS, ErrorKind, RequestError
from pipelines.inputs.manifest import Manifest
from pipelines.inputs.reader import Listing, ListRequest, Reader
from pipelines.inputs.registry import choose_reader
from pipelines.models.bundle import ModelFacts
from pipelines.outputs import Output, run_record
from pipelines.outputs.columns import chosen_columns, registered
from pipelines.outputs.contents import Done
from pipelines.outputs.lease import Lease
from pipelines.outputs.schema import RESERVED_NAMES, parts_schema
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, translate_storage_errors

log = logging.getLogger(__name__)

SAMPLED_IDS = "model.quantization.sampled_ids"
# Keys that may differ between two runs on one output, because they decide only where and how fast rows are computed,
# or because the fingerprint covers them.
FREE_KEYS = (
    "output",
    "input.trust_list",
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
class OutputState:
    """Output directory, and what an earlier run left in it.

    Attributes:
        config: Config with normalized URIs.
        output: Output directory.
        found: Content of `_run.json` of an earlier run; None if there is none.
        manifest: Pinned inputs of an earlier run; None if it did not get that far.
        is_complete: True if an earlier run finished.
    """

    config: InferConfig
    output: Output
    found: dict[str, Any] | None
    manifest: Manifest | None
    is_complete: bool


@dataclass(frozen=True)
class Request:
    """Resolved request.

    Attributes:
        config: Config with normalized URIs.
        output: Output directory.
        model: Facts about the model, without its weights.
        manifest: Pinned inputs.
        outputs: Section `outputs`, with the resolved number of classes per row.
        identity: Values that a later run must share to continue in the same output.
        done: Rows that the output already contains.
        is_finished: True if the output is complete, and there is nothing to retry or repair.
    """

    config: InferConfig
    output: Output
    model: ModelFacts
    manifest: Manifest
    outputs: OutputsConfig
    identity: dict[str, Any]
    done: Done
    is_finished: bool

    @property
    def num_todo(self) -> int:
        """Number of inputs without a row."""
        return self.done.ids.size - len(self.done.ids)

    @property
    def num_done(self) -> int:
        """Number of inputs that already had a row when the run began."""
        return len(self.done.ids)


def find_output_state(config: InferConfig) -> OutputState:
    """Normalize the URIs of the request, and find what an earlier run left in the output.

    Raises:
        RequestError: The input does not exist, the input or output cannot be used, or they overlap.
    """
    input_uri, output_uri = uris.normalize(config.input.uri), uris.normalize(config.output.uri)
    uris.refuse_overlap(output_uri, {"input.uri": input_uri})
    section = config.output.model_copy(update={"uri": output_uri})
    config = config.model_copy(update={"input": config.input.model_copy(update={"uri": input_uri}), "output": section})
    output = Output(output_uri)
    found = output.find_run()
    manifest = output.find_manifest() if found else None
    if manifest is None and not exists(input_uri):
        raise RequestError(f"no input: nothing found under {input_uri}")
    return OutputState(config, output, found, manifest, manifest is not None and output.is_complete())


def resolve_request(state: OutputState, engine: Engine, lease: Lease) -> Request:
    """Resolve the rest of the request, cheapest checks first; then acquire the lease and pin the manifest.

    Raises:
        RequestError: The request is wrong, or the output belongs to a different run.
    """
    config, output, found, manifest = state.config, state.output, state.found, state.manifest
    # List in a thread, so that wrong weights are refused without waiting for a listing that may take minutes.
    lister = ThreadPoolExecutor(1)
    reader = manifest.reader if manifest else choose_reader(config.input.uri)
    pending_listing = None if manifest else lister.submit(reader.list, _list_request(config))
    lister.shutdown(wait=False)
    outputs = resolve_outputs(config, engine.facts)
    # The listing ends before the first write, so that a request without input leaves nothing behind. Later runs read
    # the manifest instead.
    listing = pending_listing.result() if pending_listing else None
    if listing is not None:
        uris.refuse_linked_overlap(output.uri, "input.uri", listing.linked)
        _refuse_reserved_columns(listing, reader, parts_schema(chosen_columns(outputs), engine.facts))
    sampled_ids: list[int] | None = None
    if engine.is_quantized:
        sampled_ids = _quantize(engine, reader, manifest, listing, _sampled_ids(found))
    identity = identify(config, engine.facts, outputs, sampled_ids)
    if found:
        output.refuse_other_run(found, identity, InferConfig)
    with translate_storage_errors("write to", output.uri):
        lease.acquire()
    output.refuse_if_changed(found)
    lease.confirm()
    if not state.is_complete:
        output.write_run(describe_run(config, engine.facts, identity, found or {}))
    epoch = lease.fence.epoch
    if listing is not None:
        manifest = output.write_manifest(config.input.uri, config.input.exclude, listing, epoch, reader.name)
    assert manifest is not None
    done = output.find_done(manifest.num_inputs, epoch, RETRIED_KINDS[config.failure.retry])
    is_finished = state.is_complete and output.matches_record(done)
    if state.is_complete and not is_finished and config.failure.retry == "none":
        log.info("%s is marked as finished, but its files differ from its record: repairing it", output.uri)
    return Request(config, output, engine.facts, manifest, outputs, identity, done, is_finished)


def _list_request(config: InferConfig) -> ListRequest:
    return ListRequest(config.input.uri, config.input.exclude, config.input.trust_list)


def _refuse_reserved_columns(listing: Listing, reader: Reader, schema: pa.Schema) -> None:
    """Refuse carried columns whose names the output uses itself."""
    own = {"id", "uri", "etag", *reader.locators}
    reserved = [name for name in listing.table.column_names if name in RESERVED_NAMES.union(schema.names) - own]
    if reserved:
        raise RequestError(f"the input column {reserved[0]!r} has the same name as an output column: rename it")


def resolve_outputs(config: InferConfig, model: ModelFacts) -> OutputsConfig:
    """Return the section `outputs`, with all classes as `topk` if the model has fewer than the default.

    Raises:
        RequestError: The model has no classifier, or fewer classes than the user asked for.
    """
    if config.outputs.topk <= model.num_classes:
        return config.outputs
    if not model.num_classes:
        raise RequestError(
            f"the weights {config.model.weights} have no classifier, so there are no classes to write: "
            "set outputs.topk to 0 to write embeddings only"
        )
    if config.outputs.is_set("topk"):
        raise RequestError(f"outputs.topk = {config.outputs.topk}, but the model has {model.num_classes} classes")
    return config.outputs.model_copy(update={"topk": model.num_classes})


def _sampled_ids(found: dict[str, Any] | None) -> list[int] | None:
    ids: list[int] | None = found["identity"].get(SAMPLED_IDS) if found else None
    return ids


def _quantize(
    engine: Engine, reader: Reader, manifest: Manifest | None, listing: Listing | None, pinned_ids: list[int] | None
) -> list[int]:
    """Quantize the model with images of the input, the same ones in each run on an output, and return their ids."""
    if manifest is not None:
        ids = engine.sample_positions(manifest.num_inputs) if pinned_ids is None else pinned_ids
        return engine.quantize(manifest.rows(np.array(ids, np.int64)), reader, is_pinned=pinned_ids is not None)
    assert listing is not None
    positions = engine.sample_positions(listing.table.num_rows)
    rows = listing.table.take(positions).add_column(0, "id", pa.array(positions))
    return engine.quantize(rows, reader)


def identify(
    config: InferConfig, model: ModelFacts, outputs: OutputsConfig, sampled_ids: list[int] | None
) -> dict[str, Any]:
    """Return the identity of a run: the values that two runs on one output must share."""
    sampled = {} if sampled_ids is None else {SAMPLED_IDS: sampled_ids}
    resolved = {
        "model.name": model.name,
        "fingerprint": model.fingerprint,
        run_record.LABEL_NAMES_KEY: run_record.label_names_digest(model.label_names),
        "outputs.topk": outputs.topk,
        run_record.REGISTERED_COLUMNS_KEY: [columns.name for columns in registered],
    }
    return run_record.identity_of(config, FREE_KEYS, resolved | sampled)


def describe_run(
    config: InferConfig, model: ModelFacts, identity: dict[str, Any], earlier: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of `_run.json`.

    Args:
        config: Config with normalized URIs.
        model: Facts about the model.
        identity: Identity of the run.
        earlier: Earlier content of `_run.json`, whose summary is kept.
    """
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


def file_metadata(model: ModelFacts) -> dict[str, str]:
    """Return the key-value metadata of each Parquet file, which identifies the model that computed its rows."""
    return {
        "fingerprint": model.fingerprint,
        "model": model.name,
        "transform": json.dumps(asdict(model.transform)),
        "label_names": json.dumps(model.label_names),
    }
