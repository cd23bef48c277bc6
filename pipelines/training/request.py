"""A request, resolved: every question that a config leaves open, answered on the driver before anything is computed."""

import logging
import posixpath
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.inputs.labelled import LabelledImages, find_pinned, pin, read_labelled, refuse_one_class
from pipelines.outputs import Output, run_record
from pipelines.storage import uris
from pipelines.training.plan import TrainPlan, plan_training
from pipelines.training.sampler import EpochSampler
from pipelines.training.start import StartingPoint, resolve_start

log = logging.getLogger(__name__)

# What may differ between two runs that share an output: how a recipe is carried out, not the recipe or its images. As
# the number of workers, the last two change the rounding, and the images that a batch norm sees at once.
FREE = ("scaling", "logging", "checkpoint", "failure", "optim.grad_accum_steps", "model.compile")
# Ray Train's list of checkpoints, without which it goes on from none.
CHECKPOINTS_FILE = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class TrainRequest:
    """A config whose every question is answered.

    Attributes:
        config: with normalized URIs.
        output: where checkpoints and records go.
        identity: what another run must share to continue in the same output.
        sets: `train` and, where there is one, `validation`.
        start: what is trained.
        plan: the run in numbers.
    """

    config: TrainConfig
    output: Output
    identity: dict[str, Any]
    sets: dict[str, LabelledImages]
    start: StartingPoint
    plan: TrainPlan

    def tables(self) -> dict[str, pa.Table]:
        """Return `uri`, the locators of the reader, and `target` of each set."""
        class_names = list(self.start.class_names)
        return {
            name: images.rows().drop_columns(["id"]).append_column("target", pa.array(images.targets(class_names)))
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
        self.output.write_run(self.describe())
        for name, images in self.sets.items():
            pin(_data_uri(self.output), name, images)


def find_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of the run that the output holds, if that has ended.

    A run that left no checkpoint has learnt nothing. Any other may begin in its place.

    Raises:
        RequestError: the output holds another run, or something else.
    """
    output = Output(config.output.uri)
    found = output.find_run()
    if found is None:
        return None
    summary: dict[str, Any] | None = found.get("summary")
    if summary is not None or has_checkpoint(output):
        output.refuse_other_run(found, _identity(config))
    return summary


def has_checkpoint(output: Output) -> bool:
    """Return whether an output holds a checkpoint to continue from."""
    return CHECKPOINTS_FILE in output.list_names()


def _data_uri(output: Output) -> str:
    """Return the URI of the folder that holds the pinned sets."""
    return output.uri_of("_data")


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
    output = Output(config.output.uri)
    goes_on = has_checkpoint(output)
    sets = {
        name: (find_pinned(_data_uri(output), name) if goes_on else None)
        or read_labelled(section.uri, section.exclude, trust_list=section.trust_list)
        for name, section in sections.items()
        if section is not None
    }
    for name, images in sets.items():
        uris.refuse_linked_overlap(output.uri, f"data.{name}.uri", images.linked)
    refuse_one_class(sets["train"], "data.train.uri")
    if "validation" in sets and (num_shared := sets["validation"].num_shared(sets["train"])):
        log.warning("%d of the validation images are training images too: their score says nothing", num_shared)
    sizes = {name: images.table.num_rows for name, images in sets.items()}
    # Refuses a set too small for one batch, before the weights are read.
    EpochSampler(sizes["train"], config.optim.global_batch_size, config.optim.seed)
    start = resolve_start(config, sets["train"].class_names())
    if goes_on:
        _refuse_other_classes(output, start)
    plan = plan_training(config, start, sizes["train"], sizes.get("validation", 0))
    request = TrainRequest(config, output, _identity(config), sets, start, plan)
    request.tables()  # refuses a class of the validation images that the model lacks
    return request


def _refuse_other_classes(output: Output, start: StartingPoint) -> None:
    """Refuse to go on where the weights, read again, name other classes or another order of them.

    Raises:
        RequestError: the targets of the checkpoints would mean other classes.
    """
    found = output.find_run() or {}
    known = {"identity": {"label_names": found.get("label_names")}}
    output.refuse_other_run(known, {"label_names": list(start.class_names)})


def _identity(config: TrainConfig) -> dict[str, Any]:
    """Return what has to be the same for two runs to share an output."""
    return run_record.identity_of(config, FREE, resolved={})
