"""Parts of the training recipe, built by timm's factories."""

import difflib
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.models.build import TimmModule, classifier_prefixes

# An EMA whose window is longer than this fraction of the steps lags behind its model. That lasts for 124 steps with
# timm's warm-up, and for 5,000 steps with a constant decay of 0.999. Top-1 on digits (resnet10t, cosine, warm-up), EMA
# against model: after 36 steps 0.40 against 0.85, after 90 steps 0.983 against 0.987, after 360 steps 1.0 for both.
MAX_WINDOW_FRACTION = 0.2


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Return the batch norms of a module."""
    return (child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm))


def freeze(module: TimmModule, config: TrainConfig) -> None:
    """Freeze the parameters that the config excludes from training."""
    if config.model.freeze_backbone:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(classifier_prefixes(module)))
    if config.model.freeze_batch_norm:
        for norm in batch_norms(module):
            norm.requires_grad_(False)


def make_optimizer(config: TrainConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer, without frozen parameters and without weight decay for biases and norms.

    Raises:
        RequestError: timm does not know the optimizer, or it does not work for this run.
    """
    optim = config.optim
    known = [str(name) for name in list_optimizers()]
    if optim.opt.lower() not in known:
        near = difflib.get_close_matches(optim.opt.lower(), known, n=3)
        hint = f", did you mean {' or '.join(near)}?" if near else f"; it knows: {', '.join(known)}"
        raise RequestError(f"timm knows no optimizer {optim.opt!r}{hint}")
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            module,
            opt=optim.opt,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
        )
    except (ValueError, AssertionError) as error:
        raise RequestError(f"optim.opt = {optim.opt}: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise RequestError(
            f"optim.opt = {optim.opt} needs second derivatives, which training does not compute: choose another"
        )
    return optimizer


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Create timm's schedule at step 0. `step_update(num_updates)` moves it to any other step."""
    optim = config.optim
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=optim.sched,
        num_epochs=optim.epochs,
        warmup_epochs=optim.warmup_epochs,
        warmup_lr=optim.warmup_lr,
        min_lr=optim.min_lr,
        decay_epochs=optim.decay_epochs,
        decay_rate=optim.decay_rate,
        decay_milestones=optim.decay_milestones,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    schedule.step_update(num_updates=0)
    return schedule


class BatchMixup(Mixup):
    """timm's mixup and CutMix in batch mode, for batches of any size.

    timm pairs image i with image n - 1 - i and asserts that n is even. With an odd n, the middle image is its own
    partner and stays unchanged.
    """

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images (batch x 3 x height x width) in place, and return them with soft targets (batch x num_classes)."""
        lam = self._mix_batch(images)  # type: ignore[no-untyped-call]
        return images, mixup_target(target, self.num_classes, lam, self.label_smoothing)


def make_ema(config: TrainConfig, module: nn.Module) -> ModelEmaV3 | None:
    """Return timm's exponential moving average of a module's weights, or None if the config does not ask for it."""
    optim = config.optim
    return ModelEmaV3(module, decay=optim.ema_decay, use_warmup=optim.ema_warmup) if optim.ema_decay else None


def is_settled(ema: ModelEmaV3, num_steps: int) -> bool:
    """Return whether the window of an EMA, 1 / (1 - decay) steps, is a small fraction of `num_steps` steps."""
    return 1 / (1 - ema.get_decay(num_steps)) <= MAX_WINDOW_FRACTION * num_steps


def make_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix, or None if the config asks for neither."""
    augment = config.augment
    if not augment.mixup and not augment.cutmix:
        return None
    smoothing = config.optim.label_smoothing
    return BatchMixup(  # type: ignore[no-untyped-call]
        augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=num_classes
    )


def make_loss(config: TrainConfig, is_soft: bool) -> nn.Module:
    """Create the loss, which averages over a batch.

    Args:
        config: Config of the run.
        is_soft: True if targets are probabilities from mixup, which include the label smoothing.
    """
    smoothing = config.optim.label_smoothing
    if config.optim.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if is_soft else smoothing)
    if is_soft:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
