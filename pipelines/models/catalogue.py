"""Catalogue of the ECA family, with the figures of its model cards."""

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
    """Figures of a model card.

    Attributes:
        num_macs: Multiply-adds for one image of 256 x 256 pixels (the card calls them FLOPs).
        state_dict_bytes: Size of the weights file.
        num_layers: Number of layers; None if the card does not state it.
        image_size: Side of the train and eval input in pixels.
        crop_pct: Fraction of the resized image that the eval crop keeps.
        interpolation: Filter of the eval resize.
    """

    num_macs: int
    state_dict_bytes: int
    num_layers: int | None
    image_size: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bicubic"


CARD_IMAGE_SIZE = 256

# Source: page "ECA-ResNet" of timm's documentation (hfdocs/source/models/ecaresnet.mdx in its repository).
MODEL_CARDS = {
    "ecaresnet101d": ModelCard(10_377_193_728, 178_815_067, 101),
    "ecaresnet101d_pruned": ModelCard(4_463_972_081, 99_852_736, 101),
    "ecaresnet50d_pruned": ModelCard(3_250_730_657, 79_990_436, 50),
    "ecaresnet50d": ModelCard(5_591_090_432, 102_579_290, 50),
    "ecaresnetlight": ModelCard(5_276_118_784, 120_956_612, None),
}
