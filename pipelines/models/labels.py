"""Names of the classes."""

from typing import Any

from timm.data.imagenet_info import ImageNetInfo

from pipelines.errors import RequestError


def resolve_class_ids(label_names: tuple[str, ...]) -> tuple[str, ...]:
    """What the folders of a labelled set are named for: the label names, or WordNet's ids for those of ImageNet."""
    imagenet = ImageNetInfo("imagenet-1k")
    if label_names != tuple(imagenet.label_descriptions()):
        return label_names
    return tuple(imagenet.label_names())


def resolve_label_names(checkpoint_config: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """The checkpoint's names, else timm's ImageNet descriptions when there are 1,000 classes, else the indices.

    Args:
        checkpoint_config: the `config.json` of a timm directory; empty where there is none.
        num_classes: how many names are wanted.

    Raises:
        RequestError: the checkpoint names another number of classes.
    """
    names = checkpoint_config.get("label_names") or checkpoint_config.get("pretrained_cfg", {}).get("label_names")
    if names:
        if len(names) != num_classes:
            raise RequestError(f"config.json names {len(names)} classes, but the weights have {num_classes}")
        return tuple(str(name) for name in names)
    if num_classes == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        return tuple(imagenet.index_to_description(index) for index in range(num_classes))
    return tuple(str(index) for index in range(num_classes))
