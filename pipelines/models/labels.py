"""Names of the classes."""

from typing import Any

from timm.data.imagenet_info import ImageNetInfo
from timm.utils.misc import natural_key

from pipelines.errors import RequestError

MAX_CLASSES_SHOWN = 6


def resolve_class_ids(label_names: tuple[str, ...]) -> tuple[str, ...]:
    """What the folders of a labelled set are named for: the label names, or WordNet's ids for those of ImageNet."""
    imagenet = ImageNetInfo("imagenet-1k")
    if label_names != tuple(imagenet.label_descriptions()):
        return label_names
    return tuple(imagenet.label_names())


def resolve_label_names(checkpoint_config: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the checkpoint's names, else timm's ImageNet descriptions for 1,000 classes, else the indices.

    Args:
        checkpoint_config: The `config.json` of a timm directory; empty if there is none.
        num_classes: Rows of the classifier; 0 if there is none.

    Raises:
        RequestError: The checkpoint names another number of classes.
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
    """Name the classes of a model that names none: as many classes of images, in the order of timm's folder reader.

    timm's own checkpoints hold no names. Its reader sorts folders naturally: `img2` before `img10`, without regard to
    case.

    Args:
        label_names: of the model; its indices where it names no classes.
        image_classes: names of the classes of the images, in any order.

    Returns:
        One name for each logit, or None where the model has names or another number of classes.
    """
    if label_names != tuple(str(index) for index in range(len(image_classes))):
        return None
    return tuple(sorted(image_classes, key=natural_key))


def describe_order(names: tuple[str, ...]) -> str:
    """Say which class each index of a model was taken for."""
    shown = [f"{index} = {name}" for index, name in enumerate(names)]
    some = shown if len(shown) <= MAX_CLASSES_SHOWN else [*shown[: MAX_CLASSES_SHOWN - 1], "...", shown[-1]]
    return f"the weights name no classes; taken for the images' in timm's order: {', '.join(some)}"
