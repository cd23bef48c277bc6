"""Names and ids of the classes of a model."""

from typing import Any

from timm.data.imagenet_info import ImageNetInfo
from timm.utils.misc import natural_key

from pipelines.errors import RequestError

MAX_CLASSES_SHOWN = 6


def resolve_class_ids(label_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folder name of each class in labelled sets: its label name, or its WordNet id for ImageNet."""
    imagenet = ImageNetInfo("imagenet-1k")
    if label_names != tuple(imagenet.label_descriptions()):
        return label_names
    return tuple(imagenet.label_names())


def resolve_label_names(checkpoint_config: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the checkpoint's names, else timm's ImageNet descriptions for 1,000 classes, else the indices.

    Args:
        checkpoint_config: Content of the `config.json` of a timm directory; empty if there is none.
        num_classes: Number of classes; 0 if the model has no classifier.

    Raises:
        RequestError: The checkpoint names a different number of classes.
    """
    if not num_classes:
        return ()
    cfg = checkpoint_config.get("pretrained_cfg") or {}
    names = checkpoint_config.get("label_names") or cfg.get("label_names")
    if names:
        if len(names) != num_classes:
            raise RequestError(f"config.json names {len(names)} classes, but the weights have {num_classes}")
        return tuple(str(name) for name in names)
    if num_classes == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        return tuple(imagenet.index_to_description(index) for index in range(num_classes))
    return tuple(str(index) for index in range(num_classes))


def match_by_order(label_names: tuple[str, ...], image_classes: list[str]) -> tuple[str, ...] | None:
    """Match the classes of images to a model without class names, in the order of timm's folder reader.

    timm's own checkpoints do not contain class names. Its folder reader sorts names naturally and without regard to
    case: `img2` comes before `img10`.

    Args:
        label_names: Label names of the model, which are its indices if it has no class names.
        image_classes: Class names of the images, in any order.

    Returns:
        The name of each class index, or None if the model has class names or a different number of classes.
    """
    if label_names != tuple(str(index) for index in range(len(image_classes))):
        return None
    return tuple(sorted(image_classes, key=natural_key))


def describe_order(names: tuple[str, ...]) -> str:
    """Return a log line that shows the class name assigned to each index."""
    shown = [f"{index} = {name}" for index, name in enumerate(names)]
    some = shown if len(shown) <= MAX_CLASSES_SHOWN else [*shown[: MAX_CLASSES_SHOWN - 1], "...", shown[-1]]
    return f"the weights contain no class names; assigned those of the images in timm's order: {', '.join(some)}"
