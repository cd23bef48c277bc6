"""Weights that distinguish photographs.

With raw random weights, the output is nearly the same for every image, so tests of parity would prove nothing.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models.resnet import BasicBlock, Bottleneck

# Scale of the last batch norm in a block. With 1, rounding errors grow from block to block: probabilities of timm
# itself then differ from float64 by up to 2e-5, but only by 1e-6 with 0.5.
LAST_OF_A_BLOCK = 0.5
# Gain of the classifier. Larger values also magnify rounding errors.
GAIN = 1.0


def save_telling_weights(name: str, photographs: Path, path: Path) -> None:
    """Save a model with batch-norm statistics of real images, and a classifier normalized to their features."""
    torch.manual_seed(1)
    model: Any = timm.create_model(name)
    images = load_images(model, photographs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # use the average over all images
            module.weight.data.fill_(1.0)
    for block in model.modules():  # timm initializes most of these with 0, which disables the block
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
    """Return all photographs after timm's own eval transform, sorted by name (count x 3 x 224 x 224)."""
    transform: Any = create_transform(**resolve_data_config({}, model=model), is_training=False)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(photographs.iterdir())])
