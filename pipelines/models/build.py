"""Building timm models: names, modules, shapes and transforms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform

# All timm classifiers have methods (`forward_features`, `forward_head`) and attributes that nn.Module does not declare.
TimmModule = Any


def check_model_name(name: str) -> None:
    """Refuse a model name or tag that timm does not have.

    Raises:
        RequestError: The name is unknown. The message suggests similar names.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        similar = timm.list_models(f"*{architecture[:6]}*")[:8]
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise RequestError(f"timm {timm.__version__} knows no model {architecture!r}{hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        raise RequestError(f"{architecture} has no tag {tag!r}; it has: {', '.join(tags) or 'none'}")


@dataclass(frozen=True)
class Architecture:
    """Output sizes of a model.

    Attributes:
        num_classes: Length of the logits; 0 for a model without a classifier.
        num_features: Length of the pooled features, the input of the classifier.
    """

    num_classes: int
    num_features: int


def build_on_meta(name: str, num_classes: int | None = None, **options: Any) -> TimmModule:
    """Build a module on torch's meta device, which has shapes but no values and so needs no initialization."""
    with torch.device("meta"):
        return create(name, num_classes, **options)


def create(name: str, num_classes: int | None = None, **options: Any) -> TimmModule:
    """Build a timm module in eval mode, with random weights.

    Args:
        name: timm's name of the model, with or without a tag.
        num_classes: Length of the logits; None for the model's own.
        options: Further arguments of the model's constructor, such as `drop_path_rate`. Models differ in what they
            accept.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    return timm.create_model(name, **options).eval()


def classifier_prefixes(module: TimmModule) -> tuple[str, ...]:
    """Return the name prefixes of the classifier's tensors. Distilled models have two classifiers."""
    return prefixes_from_cfg(module.pretrained_cfg)


def prefixes_from_cfg(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the name prefixes of the classifier's tensors from timm's `pretrained_cfg`, without a module."""
    classifier = pretrained_cfg["classifier"]
    names = classifier if isinstance(classifier, list | tuple) else [classifier]
    return tuple(f"{name}." for name in names)


def load_weights(module: TimmModule, name: str, state_dict: Mapping[str, torch.Tensor]) -> TimmModule:
    """Load weights into a module, and return it.

    Args:
        module: Module of `build_on_meta`.
        name: timm's name of the model.
        state_dict: Weights that fit the module.

    Returns:
        The same module, or a new one if the model has buffers that timm computes and checkpoints do not contain.
    """
    module.load_state_dict(state_dict, assign=True)
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        module = create(name, module.num_classes)
        module.load_state_dict(state_dict)
    return module


def describe(module: TimmModule, input_size: tuple[int, int]) -> Architecture:
    """Return the output sizes of a model, computed from shapes alone.

    Args:
        module: Module of `build_on_meta`.
        input_size: Height and width in pixels.

    Raises:
        RequestError: The model does not accept that size, or is not a classifier of RGB images.
    """
    try:
        with torch.inference_mode():
            logits, embedding = HeadAndFeatures(module)(torch.empty(1, 3, *input_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        height, width = input_size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = module.pretrained_cfg["architecture"]
        raise RequestError(f"{name} does not accept images of {height} x {width} pixels: {reason}") from None
    return Architecture(logits.shape[-1] if module.num_classes else 0, embedding.shape[-1])


class HeadAndFeatures(nn.Module):
    """Wrapper of a timm classifier that computes logits and pooled features in one pass through the backbone.

    The head runs twice, at the cost of one more pooling, because `forward_head` is the only interface that all timm
    classifiers share, including those with distilled and convolutional heads.
    """

    def __init__(self, model: TimmModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits (batch x num_classes) and features (batch x num_features).

        Args:
            images: Normalized images, batch x 3 x H x W.
        """
        features = self.model.forward_features(images)
        return self.model.forward_head(features), self.model.forward_head(features, pre_logits=True)


def resolve_transform(pretrained_cfg: dict[str, Any], image_size: int | None, use_test_size: bool) -> EvalTransform:
    """Return the eval transform of a model, as timm's `resolve_data_config` defines it.

    Args:
        pretrained_cfg: timm's config of the model or of its checkpoint.
        image_size: Side of the input in pixels; None for the model's own.
        use_test_size: True to use the test size and crop.

    Raises:
        RequestError: The model does not take images with three channels.
    """
    args = {} if image_size is None else {"img_size": image_size}
    config = resolve_data_config(args, pretrained_cfg=pretrained_cfg, use_test_size=use_test_size)
    if config["input_size"][0] != 3:
        raise RequestError(f"the model takes images with {config['input_size'][0]} channels, but RGB images have 3")
    return EvalTransform(
        input_size=tuple(config["input_size"][1:]),
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"] or "center",
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
