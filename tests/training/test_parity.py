"""Training steps against the loop of timm's `train.py` (1.0.31): same weights and images, same losses and weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad
from torch import nn

from pipelines.config.train import TrainConfig
from pipelines.training.learner import Learner, Task
from pipelines.training.seeds import seed_generators

CPU = torch.device("cpu")
NUM_CLASSES, NUM_EPOCHS, STEPS_PER_EPOCH, NUM_STEPS = 4, 4, 3, 9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TASK = Task("test_resnet", NUM_CLASSES, MEAN, STD, STEPS_PER_EPOCH)

RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum and decay": {"momentum": 0.5, "weight_decay": 0.1},
    "adamw": {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.7, "warmup_epochs": 1},
    "lamb": {"opt": "lamb", "lr": 5e-3, "weight_decay": 0.02, "clip_grad": 0.5},
    "smoothing": {"label_smoothing": 0.1},
    "bce": {"label_smoothing": 0.1, "bce_loss": True},
    "mixup": {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0},
    "bce and mixup": {"bce_loss": True, "mixup": 0.1},
    "erasing": {"random_erase_prob": 0.5, "mixup": 0.2},
    "accumulation": {"grad_accum_steps": 2},
    "drop path": {"drop_path_rate": 0.2},
    "step": {"sched": "step", "decay_epochs": 1, "decay_rate": 0.3, "warmup_epochs": 1, "warmup_lr": 1e-3},
    "multistep": {"sched": "multistep", "decay_milestones": [1, 2]},
    "poly": {"sched": "poly", "decay_rate": 0.9, "min_lr": 1e-3},
    "constant": {"sched": "constant"},
}
# Of the keys that are not in `optim`.
SECTIONS = {"mixup": "augment", "cutmix": "augment", "random_erase_prob": "augment", "drop_path_rate": "model"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several, such small batches take ten times as long on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def batch(step: int) -> dict[str, Any]:
    """A global batch of 8 images, whose class shows in the colour."""
    random: Any = np.random.default_rng(step)
    target = random.integers(0, NUM_CLASSES, 8)
    image = random.integers(0, 60, (8, 32, 32, 3)).astype(np.uint8)
    image[..., 0] += (target * 60)[:, None, None].astype(np.uint8)
    return {"id": np.arange(8), "target": target, "image": image, "error": np.array([""] * 8, dtype=object)}


def module(recipe: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return timm.create_model(TASK.architecture, num_classes=NUM_CLASSES, drop_path_rate=recipe.get("drop_path_rate"))


def steps_of_learner(recipe: dict[str, Any]) -> tuple[list[float], list[float], nn.Module]:
    sections: dict[str, Any] = {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}, "augment": {}, "model": {}}
    sections["optim"] = {"global_batch_size": 8, "epochs": NUM_EPOCHS, "lr": 0.05}
    for key, value in recipe.items():
        sections[SECTIONS.get(key, "optim")][key] = value
    learner = Learner(TrainConfig.model_validate(sections), TASK, module(recipe), CPU)
    losses, rates = [], []
    for step in range(NUM_STEPS):
        rates.append(learner.lr)
        losses.append(float(learner.learn(batch(step))))
    return losses, rates, learner.module


def timm_optimizer(recipe: dict[str, Any], model: nn.Module) -> tuple[Any, Any]:
    optimizer = create_optimizer_v2(
        model,
        opt=recipe.get("opt", "sgd"),
        lr=recipe.get("lr", 0.05),
        weight_decay=recipe.get("weight_decay", 1e-4),
        momentum=recipe.get("momentum", 0.9),
        layer_decay=recipe.get("layer_decay"),
    )
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.get("sched", "cosine"),
        num_epochs=NUM_EPOCHS,
        decay_epochs=recipe.get("decay_epochs", 30),
        decay_milestones=recipe.get("decay_milestones", []),
        decay_rate=recipe.get("decay_rate", 0.1),
        min_lr=recipe.get("min_lr", 0.0),
        warmup_lr=recipe.get("warmup_lr", 1e-5),
        warmup_epochs=recipe.get("warmup_epochs", 0),
        step_on_epochs=False,
        updates_per_epoch=STEPS_PER_EPOCH,
    )
    return optimizer, schedule


def timm_losses(recipe: dict[str, Any]) -> tuple[Any, nn.Module]:
    """Return timm's mixup, if there is any, and the loss."""
    smoothing, mixup, cutmix = (recipe.get(key, 0.0) for key in ("label_smoothing", "mixup", "cutmix"))
    mix: Any = None
    if mixup or cutmix:
        mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=NUM_CLASSES)
    if recipe.get("bce_loss"):
        return mix, BinaryCrossEntropy(smoothing=0.0 if mix else smoothing)
    if mix:
        return mix, SoftTargetCrossEntropy()
    return mix, LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def steps_of_timm(recipe: dict[str, Any]) -> tuple[list[float], list[float], nn.Module]:
    model = module(recipe).to(memory_format=torch.channels_last).train()
    optimizer, schedule = timm_optimizer(recipe, model)
    mix, loss_of = timm_losses(recipe)
    erase = RandomErasing(recipe.get("random_erase_prob", 0.0), mode="pixel", device="cpu")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    num_passes = recipe.get("grad_accum_steps", 1)
    losses, rates = [], []
    for step in range(NUM_STEPS):
        rows = batch(step)
        all_images = (torch.from_numpy(rows["image"]).permute(0, 3, 1, 2).float() / 255 - mean) / std
        seed_generators(0, step, 0)
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        total = 0.0
        for images, target in zip(all_images.chunk(num_passes), torch.from_numpy(rows["target"]).chunk(num_passes)):
            if mix:
                images, target = mix(images, target)
            images = erase(images).contiguous(memory_format=torch.channels_last)
            loss = loss_of(model(images), target) / num_passes
            loss.backward()
            total += loss.item()
        if recipe.get("clip_grad"):
            dispatch_clip_grad(model.parameters(), recipe["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(num_updates=step + 1)
        losses.append(total)
    return losses, rates, model


@pytest.mark.parametrize("name", RECIPES)
def test_steps_equal_those_of_timms_loop(name: str) -> None:
    losses, rates, model = steps_of_learner(RECIPES[name])
    expected_losses, expected_rates, expected_model = steps_of_timm(RECIPES[name])
    assert rates == expected_rates
    assert losses == expected_losses
    expected = expected_model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_every_recipe_has_losses_of_its_own() -> None:
    last_losses = {steps_of_learner(recipe)[0][-1] for recipe in RECIPES.values()}
    assert len(last_losses) == len(RECIPES)
