"""Resolving a model once for all replicas: weights, transform, label names and fingerprint."""

from dataclasses import asdict, replace
from typing import Any

from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.images.transform import EvalTransform
from pipelines.models.build import HeadAndFeatures, describe, load_weights, resolve_transform
from pipelines.models.bundle import ModelBundle
from pipelines.models.fingerprint import fingerprint, hash_state_dict
from pipelines.models.labels import resolve_class_ids, resolve_label_names
from pipelines.models.prepare import prepare_for_inference
from pipelines.models.weights import Weights, resolve_weights, timm_version


def resolve_bundle(model: ModelConfig, preprocess: PreprocessConfig) -> ModelBundle:
    """Load and check the weights, and resolve the transform, the label names and the fingerprint.

    Raises:
        RequestError: The weights cannot be loaded, or do not fit the model or the image size.
    """
    weights = resolve_weights(model)
    transform = resolve_transform(weights.pretrained_cfg, preprocess.image_size, preprocess.use_test_size)
    architecture = describe(weights.module, transform.input_size)
    label_names = resolve_label_names(weights.checkpoint_config, architecture.num_classes)
    return ModelBundle(
        name=weights.name,
        num_classes=architecture.num_classes,
        num_features=architecture.num_features,
        label_names=label_names,
        class_ids=resolve_class_ids(label_names),
        transform=transform,
        dtype=model.dtype,
        module=HeadAndFeatures(load_weights(weights.module, weights.name, weights.state_dict)).eval(),
        fingerprint=fingerprint(_identity(weights, transform, model, preprocess.mode)),
    )


def prepare_bundle(bundle: ModelBundle) -> ModelBundle:
    """Return the bundle optimized for inference, as a traced module that replicas can load without importing timm."""
    if isinstance(bundle.module, bytes):
        return bundle  # quantized modules are already folded
    return replace(bundle, module=prepare_for_inference(bundle.module))


def _identity(weights: Weights, transform: EvalTransform, model: ModelConfig, mode: str) -> dict[str, Any]:
    return {
        **({"compile": True} if model.compile else {}),
        "weights": hash_state_dict(weights.state_dict),
        "timm": timm_version(),
        "model": weights.name.partition(".")[0],
        "transform": asdict(transform) | {"mode": mode},
        "dtype": model.dtype,
    }
