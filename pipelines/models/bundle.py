"""All that a job needs of a model. Imports neither torch nor timm: driver and replicas start in half the time."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from pipelines.images.transform import EvalTransform

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a resolved model, without its weights.

    Attributes:
        name: timm's name, with the tag where one was given.
        num_classes: length of the logits.
        num_features: length of the embedding.
        label_names: one a class.
        class_ids: one a class, what the folders of a labelled set are named for.
        transform: from decoded image to the model's input.
        dtype: precision of the forward pass.
        fingerprint: SHA-256 of weights, timm's version, model, transform and dtype.
    """

    name: str
    num_classes: int
    num_features: int
    label_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    transform: EvalTransform
    dtype: str
    fingerprint: str


@dataclass(frozen=True)
class ModelBundle(ModelFacts):
    """A model, resolved once for all replicas and shipped to them through Ray's object store.

    Attributes:
        module: batch x 3 x H x W, normalized, to logits and features; on the CPU, in eval mode. In int8 an exported
            program, as `torch.export.save` writes it.
    """

    module: "nn.Module | bytes"

    def facts(self) -> ModelFacts:
        """All but the module."""
        return ModelFacts(**{field.name: getattr(self, field.name) for field in fields(ModelFacts)})
