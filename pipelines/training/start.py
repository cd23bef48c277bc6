"""Starting point of a run: its classes, its initial weights and the module that loads them."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.config.sections import ModelConfig
from pipelines.config.train import TrainConfig, TrainModelConfig
from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform
from pipelines.models.build import (
    TimmModule,
    build_on_meta,
    check_model_name,
    classifier_prefixes,
    create,
    describe,
    resolve_transform,
)
from pipelines.models.labels import describe_order, match_by_order, resolve_class_ids, resolve_label_names
from pipelines.models.weights import Weights, resolve_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """Model before its first step.

    Attributes:
        name: timm's name of the model, with the tag if one was given.
        class_names: Name of the class of each logit.
        transform: Eval transform for validation. Training uses its input size too.
        state_dict: Initial weights for the module of `build_module`; empty for random weights.
    """

    name: str
    class_names: tuple[str, ...]
    transform: EvalTransform
    state_dict: dict[str, torch.Tensor]


def resolve_start(config: TrainConfig, image_classes: list[str]) -> StartingPoint:
    """Load the weights and match them to the classes of the images.

    A checkpoint that names the same classes keeps its classifier and its order of the classes. So does a checkpoint
    without class names, such as timm's own, that has as many classes. Any other checkpoint only keeps its backbone.

    Args:
        config: Config of the run.
        image_classes: Sorted names of the classes of the training images.

    Raises:
        RequestError: The weights cannot be loaded or do not fit the model, or the model rejects the image size.
    """
    model, image_size = config.model, config.preprocess.image_size
    if model.weights == "random":
        check_model_name(model.name)
        module = build_trainable_on_meta(config, model.name, len(image_classes))
        transform = resolve_transform(dict(module.pretrained_cfg), image_size, use_test_size=False)
        describe(module, transform.input_size)
        return StartingPoint(model.name, tuple(image_classes), transform, {})
    weights = resolve_weights(_without_training_keys(model))
    build_trainable_on_meta(config, weights.name, len(image_classes))  # rejects dropout that the model does not support
    transform = resolve_transform(weights.pretrained_cfg, image_size, use_test_size=False)
    architecture = describe(weights.module, transform.input_size)
    label_names = resolve_label_names(weights.checkpoint_config, architecture.num_classes)
    for known in (label_names, resolve_class_ids(label_names)):
        if sorted(known) == image_classes:
            return StartingPoint(weights.name, known, transform, weights.state_dict)
    ordered = match_by_order(label_names, image_classes)
    if ordered is not None:
        log.info("%s; keeping the classifier of the checkpoint", describe_order(ordered))
        return StartingPoint(weights.name, ordered, transform, weights.state_dict)
    log.info("adding a new classifier of %d classes to the backbone of %s", len(image_classes), model.weights)
    return StartingPoint(weights.name, tuple(image_classes), transform, _backbone(weights, len(image_classes)))


def build_module(config: TrainConfig, start: StartingPoint) -> TimmModule:
    """Build timm's module with the initial weights. Missing ones, such as those of a new classifier, are random."""
    torch.manual_seed(config.optim.seed)
    module = create(start.name, len(start.class_names), **_dropout(config.model))
    missing, unexpected = module.load_state_dict(start.state_dict, strict=False)
    assert not unexpected
    # Besides its last layer, a classifier may have other layers that the backbone lacks (a batch norm in LeViT).
    assert not start.state_dict or not build_on_meta(start.name, 0).state_dict().keys() & set(missing), missing
    return module


def build_trainable_on_meta(config: TrainConfig, name: str, num_classes: int) -> TimmModule:
    """Build the trainable module on torch's meta device.

    Raises:
        RequestError: A key of `model` is set that the architecture does not support.
    """
    dropout = _dropout(config.model)
    try:
        return build_on_meta(name, num_classes, **dropout)
    except TypeError:
        refused = [f"model.{key}" for key, value in dropout.items() if not _supports(name, key, value)]
        if not refused:
            raise
        raise RequestError(f"{name} does not support {' or '.join(refused)}: leave it out") from None


def _dropout(model: TrainModelConfig) -> dict[str, Any]:
    """Return the dropout arguments that are set. Not every architecture supports all of them."""
    rates = {"drop_rate": model.drop_rate, "drop_path_rate": model.drop_path_rate}
    return {key: rate for key, rate in rates.items() if rate is not None}


def _supports(name: str, key: str, value: float) -> bool:
    options: dict[str, Any] = {key: value}
    try:
        build_on_meta(name, **options)
    except TypeError:
        return False
    return True


def _without_training_keys(model: TrainModelConfig) -> ModelConfig:
    keys = {name: getattr(model, name) for name in ("name", "weights") if model.is_set(name)}
    return ModelConfig.model_validate(keys)


def _backbone(weights: Weights, num_classes: int) -> dict[str, torch.Tensor]:
    """Return all tensors but those of the classifier, whose shapes depend on the number of classes."""
    prefixes = classifier_prefixes(build_on_meta(weights.name, num_classes))
    return {name: tensor for name, tensor in weights.state_dict.items() if not name.startswith(prefixes)}
