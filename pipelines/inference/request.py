"""A resolved request: every question that a config leaves open, answered on the driver before anything is computed."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from pipelines.config.infer import InferConfig
from pipelines.engine.engine import Engine
from pipelines.errors import TRANSIENT_KINDS, ErrorKind, RequestError
from pipelines.inputs.manifest import Manifest
from pipelines.inputs.reader import Listing, ListRequest, Reader
from pipelines.inputs.registry import choose_reader
from pipelines.models.bundle import ModelFacts
from pipelines.outputs import Output, run_record
from pipelines.outputs.contents import Done
from pipelines.outputs.lease import Lease
from pipelines.outputs.schema import RESERVED_NAMES
from pipelines.storage import uris
from pipelines.storage.filesystem import exists, translate_storage_errors

log = logging.getLogger(__name__)

SAMPLED_IDS = "model.quantization.sampled_ids"
# Keys that may differ between two runs on one output: where and how fast it is computed, and what the fingerprint
# holds.
FREE = (
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
    """Where a run reads and writes, and what an earlier run left there.

    Attributes:
        config: with normalized URIs.
        output: where the rows go.
        found: `_run.json` of an earlier run.
        manifest: its pinned inputs, if it came that far.
        is_complete: whether it finished.
    """

    config: InferConfig
    output: Output
    found: dict[str, Any] | None
    manifest: Manifest | None
    is_complete: bool


@dataclass(frozen=True)
class Request:
    """A config whose every question is answered.

    Attributes:
        config: with normalized URIs.
        output: where the rows go.
        model: the model, without its weights.
        manifest: the pinned inputs.
        topk: classes per row.
        identity: what another run must share to continue in the same output.
        done: what the output holds already.
        is_finished: whether it holds everything, and nothing is to be retried or mended.
    """

    config: InferConfig
    output: Output
    model: ModelFacts
    manifest: Manifest
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


def find_output_state(config: InferConfig) -> OutputState:
    """Look at the input and the output.

    Raises:
        RequestError: the input does not exist, one of them cannot be used, or the output lies inside the input.
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
    """Answer every other question, cheapest first; then acquire the lease, and pin the manifest.

    Raises:
        RequestError: one of the answers is no.
    """
    config, output, found, manifest = state.config, state.output, state.found, state.manifest
    # Meanwhile: weights that are wrong are refused without waiting for what may be minutes.
    lister = ThreadPoolExecutor(1)
    reader = manifest.reader if manifest else choose_reader(config.input.uri)
    listed = None if manifest else lister.submit(reader.list, _list_request(config))
    lister.shutdown(wait=False)
    topk = resolve_topk(config, engine.facts)
    # Listed before the first write, so that a request without input leaves nothing behind; never again.
    listing = listed.result() if listed else None
    if listing is not None:
        uris.refuse_linked_overlap(output.uri, "input.uri", listing.linked)
        _refuse_our_names(listing, reader)
    sampled_ids: list[int] | None = None
    if engine.is_quantized:
        sampled_ids = _quantize(engine, reader, manifest, listing, _sampled_ids(found))
    identity = identify(config, engine.facts, topk, sampled_ids)
    if found:
        output.refuse_other_run(found, identity)
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
        log.info("%s is finished, but its files are not those of its record: mending it", output.uri)
    return Request(config, output, engine.facts, manifest, topk, identity, done, is_finished)


def _list_request(config: InferConfig) -> ListRequest:
    return ListRequest(config.input.uri, config.input.exclude, config.input.trust_list)


def _refuse_our_names(listing: Listing, reader: Reader) -> None:
    """Refuse columns of the input that the output has by the same name."""
    own = {"id", "uri", "etag", *reader.locators}
    taken = [name for name in listing.table.column_names if name in RESERVED_NAMES - own]
    if taken:
        raise RequestError(f"the input's column {taken[0]!r} has the name of a column of the output: rename it")


def resolve_topk(config: InferConfig, model: ModelFacts) -> int:
    """Return the classes per row: as many as asked for, or all that the model has.

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


def _quantize(
    engine: Engine, reader: Reader, manifest: Manifest | None, listing: Listing | None, pinned_ids: list[int] | None
) -> list[int]:
    """Quantize on images of the input, on the same ones in each run on an output; returns their ids."""
    if manifest is not None:
        ids = engine.sample_positions(manifest.num_inputs) if pinned_ids is None else pinned_ids
        return engine.quantize(manifest.rows(np.array(ids, np.int64)), reader, is_pinned=pinned_ids is not None)
    assert listing is not None
    positions = engine.sample_positions(listing.table.num_rows)
    rows = listing.table.take(positions).add_column(0, "id", pa.array(positions))
    return engine.quantize(rows, reader)


def identify(config: InferConfig, model: ModelFacts, topk: int, sampled_ids: list[int] | None) -> dict[str, Any]:
    """Return the identity: what has to be the same for two runs to share an output."""
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
    """Return the content of `_run.json`: the resolved config and what came of it, with the summary if there is one."""
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
    """Return the key-value metadata of each Parquet file: what gave its rows."""
    return {
        "fingerprint": model.fingerprint,
        "model": model.name,
        "transform": json.dumps(asdict(model.transform)),
        "label_names": json.dumps(model.label_names),
    }
