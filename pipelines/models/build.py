"""From timm's names to modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform

# timm's classifiers share methods (`forward_features`, `forward_head`) and attributes that nn.Module does not declare.
TimmModule = Any


def check_model_name(name: str) -> None:
    """Refuse what timm does not know.

    Raises:
        RequestError: with the nearest names that timm knows.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture[:6]}*")[:8]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise RequestError(f"timm {timm.__version__} knows no model {architecture!r}{hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        raise RequestError(f"{architecture} has no tag {tag!r}; it has: {', '.join(tags) or 'none'}")


@dataclass(frozen=True)
class Architecture:
    """A model's outputs, found without computing anything.

    Attributes:
        num_classes: Length of the logits; 0 for a model without a classifier.
        num_features: Length of the pooled features that the classifier is fed.
    """

    num_classes: int
    num_features: int


def build_on_meta(name: str, num_classes: int | None = None, **options: Any) -> TimmModule:
    """Build a module on torch's meta device: all shapes, no values, and no time spent on drawing them."""
    with torch.device("meta"):
        return create(name, num_classes, **options)


def create(name: str, num_classes: int | None = None, **options: Any) -> TimmModule:
    """Build timm's module in eval mode, its weights yet to be loaded.

    Args:
        name: timm's, with or without a tag.
        num_classes: length of the logits. Default: the model's own.
        options: further arguments of the model's constructor, such as `drop_path_rate`. Not every model takes each.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    return timm.create_model(name, **options).eval()


def classifier_prefixes(module: TimmModule) -> tuple[str, ...]:
    """Return how the names of the classifier's tensors begin; distilled models have two classifiers."""
    return prefixes_of(module.pretrained_cfg)


def prefixes_of(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the same from timm's `pretrained_cfg`, without building the module."""
    classifier = pretrained_cfg["classifier"]
    names = classifier if isinstance(classifier, list | tuple) else [classifier]
    return tuple(f"{name}." for name in names)


def load_weights(module: TimmModule, name: str, state_dict: Mapping[str, torch.Tensor]) -> TimmModule:
    """A module of `build_on_meta` with weights that fit it; none are drawn at random where that can be avoided."""
    module.load_state_dict(state_dict, assign=True)
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):  # buffers that timm computes and no checkpoint holds
        module = create(name, module.num_classes)
        module.load_state_dict(state_dict)
    return module


def describe(module: TimmModule, input_size: tuple[int, int]) -> Architecture:
    """The shape of a model at an input size.

    Args:
        module: of `build_on_meta`.
        input_size: height and width, in pixels.

    Raises:
        RequestError: the model does not take that size, or is no classifier of RGB images.
    """
    try:
        with torch.inference_mode():
            logits, embedding = HeadAndFeatures(module)(torch.empty(1, 3, *input_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        height, width = input_size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = module.pretrained_cfg["architecture"]
        raise RequestError(f"{name} does not take images of {height} x {width} pixels: {reason}") from None
    return Architecture(logits.shape[-1] if module.num_classes else 0, embedding.shape[-1])


class HeadAndFeatures(nn.Module):
    """A timm classifier that gives logits and pooled features from one pass through its backbone.

    The head runs twice, which costs one more pooling: timm's `forward_head` is the one interface that all its
    classifiers share, distilled and convolutional heads among them.
    """

    def __init__(self, model: TimmModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch x 3 x H x W, normalized, to logits (batch x num_classes) and features (batch x num_features)."""
        features = self.model.forward_features(images)
        return self.model.forward_head(features), self.model.forward_head(features, pre_logits=True)


def resolve_transform(pretrained_cfg: dict[str, Any], image_size: int | None, use_test_size: bool) -> EvalTransform:
    """The eval transform that timm's `resolve_data_config` gives for a model, resized where the user said so.

    Args:
        pretrained_cfg: timm's, of the model or of its checkpoint.
        image_size: side in pixels, in place of the model's own.
        use_test_size: take the test size and crop.
    """
    args = {} if image_size is None else {"img_size": image_size}
    config = resolve_data_config(args, pretrained_cfg=pretrained_cfg, use_test_size=use_test_size)
    if config["input_size"][0] != 3:
        raise RequestError(f"the model wants {config['input_size'][0]} channels; images have 3")
    return EvalTransform(
        input_size=tuple(config["input_size"][1:]),
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"] or "center",
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
