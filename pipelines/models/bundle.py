"""Resolved model as jobs use it. Does not import torch or timm, which halves the start-up of driver and replicas."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from pipelines.images.transform import EvalTransform

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a resolved model, without its weights.

    Attributes:
        name: timm's name, including the tag if one was given.
        num_classes: Length of the logits.
        num_features: Length of the embedding.
        label_names: Name of each class.
        class_ids: Folder name of each class in labelled sets.
        transform: Eval transform, from the decoded image to the model's input.
        dtype: Precision of the forward pass.
        fingerprint: SHA-256 of the weights, timm's version, the model, the transform and the dtype.
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
    """Model that is resolved once and sent to all replicas through Ray's object store.

    Attributes:
        module: Module on the CPU in eval mode, which maps normalized images (batch x 3 x H x W) to logits and features.
            For int8, an exported program in the format of `torch.export.save`.
    """

    module: "nn.Module | bytes"

    def facts(self) -> ModelFacts:
        """Return the facts without the module."""
        return ModelFacts(**{field.name: getattr(self, field.name) for field in fields(ModelFacts)})
