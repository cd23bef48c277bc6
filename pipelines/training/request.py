"""A request, resolved: every question that a config leaves open, answered on the driver before anything is computed."""

import logging
import posixpath
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import run_record
from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.labelled import LabelledImages, find_pinned, pin, read_labelled, refuse_one_class
from pipelines.training.order import EpochOrder
from pipelines.training.plan import TrainPlan, plan_training
from pipelines.training.start import StartingPoint, resolve_start

log = logging.getLogger(__name__)

# What may differ between two runs that share an output.
FREE_SECTIONS = ("scaling", "logging", "checkpoint", "failure")


@dataclass(frozen=True)
class TrainRequest:
    """A config whose every question is answered.

    Attributes:
        config: with normalized URIs.
        identity: what another run must share to go on in the same output.
        sets: `train` and, where there is one, `validation`.
        start: what is trained.
        plan: the run in numbers.
    """

    config: TrainConfig
    identity: dict[str, Any]
    sets: dict[str, LabelledImages]
    start: StartingPoint
    plan: TrainPlan

    def tables(self) -> dict[str, pa.Table]:
        """`uri` and `target` of each set."""
        class_names = list(self.start.class_names)
        return {
            name: pa.table({"uri": images.table["uri"], "target": images.targets(class_names)})
            for name, images in self.sets.items()
        }

    def describe(self) -> dict[str, Any]:
        """What `_run.json` says."""
        return {
            "config": self.config.model_dump(mode="json"),
            "identity": self.identity,
            "label_names": list(self.start.class_names),
        }

    def pin(self) -> None:
        """Write the request under the output, so that the same command goes on with the same images.

        Raises:
            RequestError: the output cannot be written.
        """
        run_record.write_run(self.config.output.uri, self.describe())
        for name, images in self.sets.items():
            pin(self.config.output.uri, name, images)


def find_summary(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of the run that the output holds, if that has ended.

    Raises:
        RequestError: it holds another run, or something else.
    """
    found = run_record.find_run(config.output.uri)
    if found is None:
        return None
    run_record.refuse_other_run(config.output.uri, found, _identity(config))
    summary: dict[str, Any] | None = found.get("summary")
    return summary


def normalize(config: TrainConfig) -> TrainConfig:
    """Return the config with its output URI normalized.

    Raises:
        RequestError: the output URI names no folder, or lies inside the data.
    """
    output_uri = uris.normalize(config.output.uri)
    if not posixpath.basename(output_uri) or posixpath.dirname(output_uri).endswith(":/"):
        raise RequestError(f"output.uri {config.output.uri} names no folder below a bucket or root")
    sections = {"data.train.uri": config.data.train, "data.validation.uri": config.data.validation}
    uris.refuse_overlap(output_uri, {key: section.uri for key, section in sections.items() if section is not None})
    return config.model_copy(update={"output": config.output.model_copy(update={"uri": output_uri})})


def resolve_request(config: TrainConfig) -> TrainRequest:
    """Answer every question of a normalized config, cheapest first; writes nothing.

    Raises:
        RequestError: one of the answers is no.
    """
    sections = {"train": config.data.train, "validation": config.data.validation}
    sets = {
        name: find_pinned(config.output.uri, name)
        or read_labelled(section.uri, section.exclude, trust_list=section.trust_list)
        for name, section in sections.items()
        if section is not None
    }
    for name, images in sets.items():
        uris.refuse_linked_overlap(config.output.uri, f"data.{name}.uri", images.linked)
    refuse_one_class(sets["train"], "data.train.uri")
    if "validation" in sets and (num_shared := sets["validation"].num_shared(sets["train"])):
        log.warning("%d of the validation images are training images too: their score says nothing", num_shared)
    sizes = {name: images.table.num_rows for name, images in sets.items()}
    # Refuses a set too small for one batch, before the weights are read.
    EpochOrder(sizes["train"], config.optim.global_batch_size, config.optim.seed)
    start = resolve_start(config, sets["train"].class_names())
    plan = plan_training(config, start, sizes["train"], sizes.get("validation", 0))
    request = TrainRequest(config, _identity(config), sets, start, plan)
    request.tables()  # refuses a class of the validation images that the model lacks
    return request


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What has to be the same for two runs to share an output."""
    flat = _flat(config.model_dump(mode="json"))
    free = tuple(f"{section}." for section in FREE_SECTIONS)
    return {key: value for key, value in flat.items() if not key.startswith(free)}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
