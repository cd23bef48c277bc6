"""All that a replica needs of a model, as one object. Imports no timm: replicas start in half the time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.images.transform import EvalTransform

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelBundle:
    """A model, resolved once on the driver and shipped to the replicas through Ray's object store.

    Attributes:
        name: timm's name, with the tag where one was given.
        num_classes: length of the logits.
        num_features: length of the embedding.
        label_names: one a class.
        transform: from decoded image to the model's input.
        dtype: precision of the forward pass.
        module: batch x 3 x H x W, normalized, to logits and features; float32, on the CPU, in eval mode.
        fingerprint: SHA-256 of weights, timm's version, model, transform and dtype.
    """

    name: str
    num_classes: int
    num_features: int
    label_names: tuple[str, ...]
    transform: EvalTransform
    dtype: str
    module: "nn.Module"
    fingerprint: str
