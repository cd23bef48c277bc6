"""Weights that tell photographs apart. Raw random weights give any image nearly the same answer, and prove nothing."""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models.resnet import BasicBlock, Bottleneck

# With 1, rounding grows from block to block: timm alone is then up to 2e-5 from float64 in probability, here 1e-6.
LAST_OF_A_BLOCK = 0.5
# Larger ones magnify rounding too.
GAIN = 1.0


def save_telling_weights(name: str, photographs: Path, path: Path) -> None:
    """Save a model with batch-norm statistics of real images and a classifier centred and scaled on their features."""
    torch.manual_seed(1)
    model: Any = timm.create_model(name)
    images = load_images(model, photographs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average over all that is seen
            module.weight.data.fill_(1.0)
    for block in model.modules():  # timm begins with 0 in the last batch norm of most, which cuts the block off
        if isinstance(block, BasicBlock | Bottleneck):
            last: Any = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last.weight.data.fill_(LAST_OF_A_BLOCK)
    with torch.no_grad():
        model.train()(images)
        model.eval()
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        mean, std = features.mean(dim=0), features.std(dim=0) + 1e-3
        classifier = model.get_classifier()
        weight = torch.randn_like(classifier.weight) / features.shape[1] ** 0.5 * GAIN / std
        classifier.weight.copy_(weight)
        classifier.bias.copy_(-weight @ mean)
    safetensors.torch.save_file(model.state_dict(), path)


def load_images(model: Any, photographs: Path) -> torch.Tensor:
    """All photographs through timm's own eval transform, in order of name: count x 3 x 224 x 224."""
    transform: Any = create_transform(**resolve_data_config({}, model=model), is_training=False)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(photographs.iterdir())])
