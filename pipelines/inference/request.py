"""A request, resolved: every question that a config leaves open, answered on the driver before anything is computed."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from pipelines import run_record
from pipelines.config.infer import InferConfig
from pipelines.errors import TRANSIENT_KINDS, ErrorKind, RequestError
from pipelines.inference.commit import Done, drop_failed, find_done
from pipelines.models.bundle import ModelFacts
from pipelines.storage import uris
from pipelines.storage.filesystem import is_there
from pipelines.storage.listing import list_objects
from pipelines.storage.manifest import ManifestInfo, find_manifest, write_manifest

log = logging.getLogger(__name__)

RETRIED_KINDS: dict[str, tuple[ErrorKind, ...]] = {"transient": TRANSIENT_KINDS, "all": get_args(ErrorKind)}


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
    """

    config: InferConfig
    model: ModelFacts
    manifest: ManifestInfo
    topk: int
    identity: dict[str, Any]
    done: Done

    @property
    def num_todo(self) -> int:
        """Inputs without a row yet."""
        return int(self.done.flags.size - np.count_nonzero(self.done.flags))


def resolve_request(config: InferConfig, resolve_model: Callable[[], ModelFacts]) -> Request:
    """Answer every question of a config, cheapest first, and pin the manifest.

    Args:
        config: as the user gave it.
        resolve_model: answers those about the model; called once both places have been found to be there.

    Raises:
        RequestError: one of the answers is no.
    """
    input_uri, output_uri = uris.normalize(config.input.uri), uris.normalize(config.output.uri)
    if uris.contains(input_uri, output_uri):
        raise RequestError(f"output.uri {output_uri} lies inside input.uri: the output would be listed as input")
    output = config.output.model_copy(update={"uri": output_uri})
    config = config.model_copy(update={"input": config.input.model_copy(update={"uri": input_uri}), "output": output})
    is_output_there = is_there(output_uri)
    found = run_record.find_run(output_uri) if is_output_there else None
    manifest = find_manifest(output_uri) if found else None
    if manifest is None and not is_there(input_uri):
        raise RequestError(f"no input: nothing lies under {input_uri}")
    model = resolve_model()
    topk = _resolve_topk(config, model)
    identity = _identify(config, model, topk)
    if found:
        run_record.refuse_other_run(output_uri, found, identity)
    # List before the first write, so that a request without input leaves nothing behind; never list again.
    listing = None if manifest else list_objects(input_uri, config.input.exclude)
    run_record.write_run(output_uri, describe_run(config, model, identity, found or {}))
    if listing is not None:
        manifest = write_manifest(output_uri, input_uri, config.input.exclude, listing)
    assert manifest is not None
    if config.failure.retry != "none":
        num_dropped = drop_failed(output_uri, RETRIED_KINDS[config.failure.retry])
        log.info("%d failed rows are done anew", num_dropped)
    done = find_done(output_uri, manifest.num_inputs)
    return Request(config, model, manifest, topk, identity, done)


def _resolve_topk(config: InferConfig, model: ModelFacts) -> int:
    if config.outputs.topk <= model.num_classes:
        return config.outputs.topk
    if config.outputs.is_set("topk"):
        raise RequestError(f"outputs.topk = {config.outputs.topk}, but the model has {model.num_classes} classes")
    return model.num_classes


def _identify(config: InferConfig, model: ModelFacts, topk: int) -> dict[str, Any]:
    """What has to be the same for two runs to share an output."""
    return {
        "input.uri": config.input.uri,
        "input.exclude": config.input.exclude,
        "model.name": model.name,
        "fingerprint": model.fingerprint,
        "outputs.topk": topk,
        "outputs.embedding": config.outputs.embedding,
    }


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
