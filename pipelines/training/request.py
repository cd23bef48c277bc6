"""Resolution of a request on the driver: images, classes, weights and plan, before anything is computed."""

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

# Keys that may differ between two runs with the same output, because they change neither the recipe nor its images.
# Like the number of workers, the last two change the rounding and the batches that batch norm sees.
FREE = ("scaling", "logging", "checkpoint", "failure", "optim.grad_accum_steps", "model.compile")
# Ray Train's list of checkpoints, without which it does not resume.
CHECKPOINTS_FILE = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class TrainRequest:
    """Resolved request.

    Attributes:
        config: Config with normalized URIs.
        output: Output directory of checkpoints and records.
        identity: Values that have to match for another run to resume in the same output.
        sets: Image sets by name: `train` and, if there is one, `validation`.
        start: Model before its first step.
        plan: Size of the run in numbers.
    """

    config: TrainConfig
    output: Output
    identity: dict[str, Any]
    sets: dict[str, LabelledImages]
    start: StartingPoint
    plan: TrainPlan

    def tables(self) -> dict[str, pa.Table]:
        """Return the table of each set: `uri`, the reader's locator columns and `target`."""
        class_names = list(self.start.class_names)
        return {
            name: images.rows().drop_columns(["id"]).append_column("target", pa.array(images.targets(class_names)))
            for name, images in self.sets.items()
        }

    def describe(self) -> dict[str, Any]:
        """Return the content of `_run.json`."""
        return {
            "config": self.config.model_dump(mode="json"),
            "identity": self.identity,
            "label_names": list(self.start.class_names),
        }

    def pin(self) -> None:
        """Write the request and its image sets to the output, so that the same command resumes with the same images.

        Raises:
            RequestError: The output cannot be written.
        """
        self.output.write_run(self.describe())
        for name, images in self.sets.items():
            pin(_data_uri(self.output), name, images)


def find_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of the finished run in the output, or None if there is none.

    A run without a checkpoint has made no progress, so another run may replace it.

    Raises:
        RequestError: The output holds another run, or other files.
    """
    output = Output(config.output.uri)
    found = output.find_run()
    if found is None:
        return None
    summary: dict[str, Any] | None = found.get("summary")
    if summary is not None or has_checkpoint(output):
        output.refuse_other_run(found, _identity(config), TrainConfig)
    return summary


def has_checkpoint(output: Output) -> bool:
    """Return whether an output holds a checkpoint to resume from."""
    return CHECKPOINTS_FILE in output.list_names()


def _data_uri(output: Output) -> str:
    """Return the URI of the folder that holds the pinned sets."""
    return output.uri_of("_data")


def normalize(config: TrainConfig) -> TrainConfig:
    """Return the config with its output URI normalized.

    Raises:
        RequestError: The output URI is not a folder below a bucket or root, or lies inside the data.
    """
    output_uri = uris.normalize(config.output.uri)
    if not posixpath.basename(output_uri) or posixpath.dirname(output_uri).endswith(":/"):
        raise RequestError(f"output.uri {config.output.uri} has to be a folder below a bucket or root")
    sections = {"data.train.uri": config.data.train, "data.validation.uri": config.data.validation}
    uris.refuse_overlap(output_uri, {key: section.uri for key, section in sections.items() if section is not None})
    return config.model_copy(update={"output": config.output.model_copy(update={"uri": output_uri})})


def resolve_request(config: TrainConfig) -> TrainRequest:
    """Resolve a normalized config, with the cheapest checks first. Writes nothing.

    Raises:
        RequestError: The request is wrong.
    """
    sections = {"train": config.data.train, "validation": config.data.validation}
    output = Output(config.output.uri)
    is_resuming = has_checkpoint(output)
    sets = {
        name: (find_pinned(_data_uri(output), name) if is_resuming else None)
        or read_labelled(section.uri, section.exclude, trust_list=section.trust_list)
        for name, section in sections.items()
        if section is not None
    }
    for name, images in sets.items():
        uris.refuse_linked_overlap(output.uri, f"data.{name}.uri", images.linked)
    refuse_one_class(sets["train"], "data.train.uri")
    if "validation" in sets and (num_shared := sets["validation"].num_shared(sets["train"])):
        log.warning(
            "%d of the validation images are training images too, so the scores will be too high: "
            "remove them from data.validation",
            num_shared,
        )
    sizes = {name: images.table.num_rows for name, images in sets.items()}
    # Rejects a set that is smaller than one batch before the weights are read.
    EpochSampler(sizes["train"], config.optim.global_batch_size, config.optim.seed)
    start = resolve_start(config, sets["train"].class_names())
    if is_resuming:
        _refuse_other_classes(output, start)
    plan = plan_training(config, start, sizes["train"], sizes.get("validation", 0))
    request = TrainRequest(config, output, _identity(config), sets, start, plan)
    request.tables()  # rejects validation images of a class that the model lacks
    return request


def _refuse_other_classes(output: Output, start: StartingPoint) -> None:
    """Check that the weights, read again, still name the same classes in the same order.

    Raises:
        RequestError: The targets of the checkpoint would mean other classes.
    """
    found = output.find_run() or {}
    known = {"identity": {"label_names": found.get("label_names")}}
    output.refuse_other_run(known, {"label_names": list(start.class_names)}, TrainConfig)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """Return the values that have to match for two runs to use the same output."""
    return run_record.identity_of(config, FREE, resolved={})
