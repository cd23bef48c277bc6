"""The family, and what its model cards say of the five it begins with."""

from dataclasses import dataclass

FAMILY = (
    "ecaresnet101d",
    "ecaresnet101d_pruned",
    "ecaresnet50d_pruned",
    "ecaresnet50d",
    "ecaresnetlight",
    "ecaresnet26t",
    "ecaresnet50t",
    "ecaresnet200d",
    "ecaresnet269d",
    "ecaresnext26t_32x4d",
    "ecaresnext50t_32x4d",
)


@dataclass(frozen=True)
class ModelCard:
    """The figures of a model card.

    Attributes:
        num_macs: multiply-adds of one image of 256 x 256 pixels (the card calls them FLOPs).
        state_dict_bytes: size of the weights file.
        num_layers: where the card gives it.
        image_size: side of the train and eval input, in pixels.
        crop_pct: share of the resized image that the eval crop keeps.
        interpolation: filter of the eval resize.
    """

    num_macs: int
    state_dict_bytes: int
    num_layers: int | None
    image_size: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bicubic"


CARD_IMAGE_SIZE = 256

# timm's documentation, page "ECA-ResNet" (hfdocs/source/models/ecaresnet.mdx in its repository).
MODEL_CARDS = {
    "ecaresnet101d": ModelCard(10_377_193_728, 178_815_067, 101),
    "ecaresnet101d_pruned": ModelCard(4_463_972_081, 99_852_736, 101),
    "ecaresnet50d_pruned": ModelCard(3_250_730_657, 79_990_436, 50),
    "ecaresnet50d": ModelCard(5_591_090_432, 102_579_290, 50),
    "ecaresnetlight": ModelCard(5_276_118_784, 120_956_612, None),
}
