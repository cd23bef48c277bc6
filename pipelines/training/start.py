"""What a run starts from: the classes, the weights, and the module that takes them."""

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
    """A model before its first step.

    Attributes:
        name: timm's name, with the tag where one was given.
        class_names: one a logit.
        transform: of the model, for validation; its input size is that of training too.
        state_dict: that fits the module of `build_module`; empty where it is to be drawn at random.
    """

    name: str
    class_names: tuple[str, ...]
    transform: EvalTransform
    state_dict: dict[str, torch.Tensor]


def resolve_start(config: TrainConfig, image_classes: list[str]) -> StartingPoint:
    """Find the weights, and fit them to the classes of the images.

    Weights of a checkpoint that names the same classes are kept whole, and its order of the classes with them. So are
    those that name none and have as many, as timm's own checkpoints. Of any other, all but the classifier is kept.

    Args:
        config: of the run.
        image_classes: sorted names of the classes of the training images.

    Raises:
        RequestError: the weights cannot be had, do not fit the model, or the model does not take the image size.
    """
    model, image_size = config.model, config.preprocess.image_size
    if model.weights == "random":
        check_model_name(model.name)
        module = build_trainable_on_meta(config, model.name, len(image_classes))
        transform = resolve_transform(dict(module.pretrained_cfg), image_size, use_test_size=False)
        describe(module, transform.input_size)
        return StartingPoint(model.name, tuple(image_classes), transform, {})
    weights = resolve_weights(_without_training_keys(model))
    build_trainable_on_meta(config, weights.name, len(image_classes))  # refuses dropout that the model does not take
    transform = resolve_transform(weights.pretrained_cfg, image_size, use_test_size=False)
    architecture = describe(weights.module, transform.input_size)
    label_names = resolve_label_names(weights.checkpoint_config, architecture.num_classes)
    for known in (label_names, resolve_class_ids(label_names)):
        if sorted(known) == image_classes:
            return StartingPoint(weights.name, known, transform, weights.state_dict)
    ordered = match_by_order(label_names, image_classes)
    if ordered is not None:
        log.info("%s; the classifier is kept", describe_order(ordered))
        return StartingPoint(weights.name, ordered, transform, weights.state_dict)
    log.info("a new classifier of %d classes on the backbone of %s", len(image_classes), model.weights)
    return StartingPoint(weights.name, tuple(image_classes), transform, _backbone(weights, len(image_classes)))


def build_module(config: TrainConfig, start: StartingPoint) -> TimmModule:
    """Build timm's module with the weights of the start; what they lack, such as a new classifier, is random."""
    torch.manual_seed(config.optim.seed)
    module = create(start.name, len(start.class_names), **_dropout(config.model))
    missing, unexpected = module.load_state_dict(start.state_dict, strict=False)
    assert not unexpected
    # Besides its last layer, a classifier may have layers that a backbone alone lacks (a batch norm in LeViT).
    assert not start.state_dict or not build_on_meta(start.name, 0).state_dict().keys() & set(missing), missing
    return module


def build_trainable_on_meta(config: TrainConfig, name: str, num_classes: int) -> TimmModule:
    """Build the module that is trained on torch's meta device.

    Raises:
        RequestError: a key of `model` is set that this architecture does not take.
    """
    dropout = _dropout(config.model)
    try:
        return build_on_meta(name, num_classes, **dropout)
    except TypeError:
        refused = [f"model.{key}" for key, value in dropout.items() if not _takes(name, key, value)]
        if not refused:
            raise
        raise RequestError(f"{name} does not take {' or '.join(refused)}: leave it out") from None


def _dropout(model: TrainModelConfig) -> dict[str, Any]:
    """Return the arguments of timm's constructor that are set. Not every architecture takes each of them."""
    rates = {"drop_rate": model.drop_rate, "drop_path_rate": model.drop_path_rate}
    return {key: rate for key, rate in rates.items() if rate is not None}


def _takes(name: str, key: str, value: float) -> bool:
    options: dict[str, Any] = {key: value}
    try:
        build_on_meta(name, **options)
    except TypeError:
        return False
    return True


def _without_training_keys(model: TrainModelConfig) -> ModelConfig:
    said = {name: getattr(model, name) for name in ("name", "weights") if model.is_set(name)}
    return ModelConfig.model_validate(said)


def _backbone(weights: Weights, num_classes: int) -> dict[str, torch.Tensor]:
    """The tensors that a model of another number of classes has too: all but the classifier's."""
    prefixes = classifier_prefixes(build_on_meta(weights.name, num_classes))
    return {name: tensor for name, tensor in weights.state_dict.items() if not name.startswith(prefixes)}
