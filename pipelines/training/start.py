"""What a run starts from: the classes, the weights, and the module that takes them."""

import logging
from dataclasses import dataclass

import timm
import torch

from pipelines.config.sections import ModelConfig
from pipelines.config.train import TrainConfig, TrainModelConfig
from pipelines.images.transform import EvalTransform
from pipelines.models.build import (
    TimmModule,
    build_on_meta,
    check_model_name,
    classifier_prefixes,
    describe,
    resolve_transform,
)
from pipelines.models.labels import resolve_class_ids, resolve_label_names
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

    Weights of a checkpoint that names the same classes are kept whole, and its order of the classes with them. Of any
    other, all but the classifier is kept.

    Args:
        config: of the run.
        image_classes: sorted names of the classes of the training images.

    Raises:
        RequestError: the weights cannot be had, do not fit the model, or the model does not take the image size.
    """
    model, image_size = config.model, config.preprocess.image_size
    if model.weights == "random":
        check_model_name(model.name)
        module = build_on_meta(model.name, len(image_classes))
        transform = resolve_transform(dict(module.pretrained_cfg), image_size, use_test_size=False)
        describe(module, transform.input_size)
        return StartingPoint(model.name, tuple(image_classes), transform, {})
    weights = resolve_weights(_without_training_keys(model))
    transform = resolve_transform(weights.pretrained_cfg, image_size, use_test_size=False)
    architecture = describe(weights.module, transform.input_size)
    label_names = resolve_label_names(weights.checkpoint_config, architecture.num_classes)
    for known in (label_names, resolve_class_ids(label_names)):
        if sorted(known) == image_classes:
            return StartingPoint(weights.name, known, transform, weights.state_dict)
    log.info("a new classifier of %d classes on the backbone of %s", len(image_classes), model.weights)
    return StartingPoint(weights.name, tuple(image_classes), transform, _backbone(weights, len(image_classes)))


def build_module(config: TrainConfig, start: StartingPoint) -> TimmModule:
    """Timm's module with the weights of the start; what they lack, such as a new classifier, drawn by the seed."""
    torch.manual_seed(config.optim.seed)
    module: TimmModule = timm.create_model(
        start.name,
        num_classes=len(start.class_names),
        drop_rate=config.model.drop_rate,
        drop_path_rate=config.model.drop_path_rate,
    )
    missing, unexpected = module.load_state_dict(start.state_dict, strict=False)
    assert not unexpected
    assert not start.state_dict or all(name.startswith(classifier_prefixes(module)) for name in missing), missing
    return module


def _without_training_keys(model: TrainModelConfig) -> ModelConfig:
    said = {name: getattr(model, name) for name in ("name", "weights") if model.is_set(name)}
    return ModelConfig.model_validate(said)


def _backbone(weights: Weights, num_classes: int) -> dict[str, torch.Tensor]:
    """The tensors that a model of another number of classes has too: all but the classifier's."""
    prefixes = classifier_prefixes(build_on_meta(weights.name, num_classes))
    return {name: tensor for name, tensor in weights.state_dict.items() if not name.startswith(prefixes)}
