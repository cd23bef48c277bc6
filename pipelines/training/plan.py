"""What a run will do, and whether it can: known from its config, its images and its model, before Ray starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipelines.config.train import LR_BASE, LR_BASE_SIZE, OptimConfig, TrainConfig, scales_lr_by_root
from pipelines.errors import RequestError
from pipelines.models.build import TimmModule
from pipelines.runtime.nodes import Node
from pipelines.training.augment import TrainPixels, train_transform
from pipelines.training.recipe import freeze, make_optimizer, make_schedule
from pipelines.training.sampler import EpochSampler
from pipelines.training.start import StartingPoint, build_trainable_on_meta

NUM_RATES_SHOWN = 12
AUGMENTATIONS = "timm takes original, originalr, v0, v0r, 3a, rand-... and augmix-..., such as rand-m9-mstd0.5-inc1"
TRANSFORM_SETS = ("tweights", "t3a", "t3aw")
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TrainPlan:
    """A run in numbers.

    Attributes:
        num_train: images to learn from.
        num_validation: images to measure with; 0 for none.
        num_classes: length of the logits.
        global_batch_size: images a step.
        batch_size_per_pass: images that a worker holds at once, at its least number of workers.
        steps_per_epoch: global batches.
        num_left_out: images of an epoch that fill no batch, others in each epoch.
        total_steps: over all epochs.
        rates: epoch and learning rate at its start.
        default_lr: how the learning rate follows from the batch, where none was set.
        num_parameters: of the model.
        num_trained: of these, those that are not frozen.
        state_bytes: a worker's weights, gradients, optimizer and average.
        activation_bytes: an estimate of what a worker keeps from the forward for the backward pass.
    """

    num_train: int
    num_validation: int
    num_classes: int
    global_batch_size: int
    batch_size_per_pass: int
    steps_per_epoch: int
    num_left_out: int
    total_steps: int
    rates: list[tuple[int, float]]
    default_lr: str | None
    num_parameters: int
    num_trained: int
    state_bytes: int
    activation_bytes: int

    @property
    def worker_bytes(self) -> int:
        """An estimate of the memory that a worker needs."""
        return self.state_bytes + self.activation_bytes

    def find_lack_of_memory(self, nodes: Sequence[Node], num_workers: int) -> str | None:
        """Say by how much workers on CPUs need more memory than there is; None where they fit."""
        largest, total = max(node.memory_bytes for node in nodes), sum(node.memory_bytes for node in nodes)
        if self.worker_bytes <= largest and num_workers * self.worker_bytes <= total:
            return None
        return (
            f"the workers may not fit: {num_workers} need about {num_workers * self.worker_bytes / 2**30:.1f} GiB, and "
            f"there are {total / 2**30:.1f} GiB, {largest / 2**30:.1f} GiB of it on one node; a smaller "
            f"optim.global_batch_size or preprocess.image_size, or more optim.grad_accum_steps, need less"
        )

    def lines(self) -> Iterator[str]:
        """Yield the figures as lines for people."""
        yield (
            f"images: {self.num_train:,} to learn from, {self.num_validation:,} to measure with, "
            f"{self.num_classes:,} classes"
        )
        yield (
            f"global batch: {self.global_batch_size:,}, {self.batch_size_per_pass:,} on a worker at a time; "
            f"{self.steps_per_epoch:,} steps an epoch ({self.num_left_out:,} images left out of each), "
            f"{self.total_steps:,} in all"
        )
        rates = ", ".join(f"{rate:.3g} ({epoch})" for epoch, rate in self.rates)
        yield f"learning rate, at the start of the epoch in brackets: {rates}"
        if self.default_lr is not None:
            yield f"optim.lr is not set: {self.default_lr}"
        yield f"parameters: {self.num_parameters:,}, of which {self.num_trained:,} are trained"
        yield (
            f"memory of a worker: about {self.worker_bytes / 2**30:.1f} GiB, {self.state_bytes / 2**30:.1f} of it "
            f"weights, gradients, optimizer and EMA, {self.activation_bytes / 2**30:.1f} activations"
        )


def plan_training(config: TrainConfig, start: StartingPoint, num_train: int, num_validation: int) -> TrainPlan:
    """Build each part of the recipe without its values, and count.

    Raises:
        RequestError: a part cannot be built, or the images make no batch.
    """
    optim = config.optim
    order = EpochSampler(num_train, optim.global_batch_size, optim.seed)
    _check_augmentation(config, start)
    module = build_trainable_on_meta(config, start.name, len(start.class_names)).train()
    freeze(module, config)
    optimizer = make_optimizer(config, module)
    schedule = make_schedule(config, optimizer, order.steps_per_epoch)
    workers = config.scaling.num_workers
    least = workers if isinstance(workers, int) else workers[0]
    batch_size = -(-optim.global_batch_size // (least * optim.grad_accum_steps))
    trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return TrainPlan(
        num_train=num_train,
        num_validation=num_validation,
        num_classes=len(start.class_names),
        global_batch_size=optim.global_batch_size,
        batch_size_per_pass=batch_size,
        steps_per_epoch=order.steps_per_epoch,
        num_left_out=num_train - order.steps_per_epoch * optim.global_batch_size,
        total_steps=order.steps_per_epoch * optim.epochs,
        rates=_rates(optimizer, schedule, optim.epochs, order.steps_per_epoch),
        default_lr=None if optim.is_set("lr") else _explain_lr(optim),
        num_parameters=num_parameters,
        num_trained=sum(trained),
        state_bytes=_state_bytes(config, num_parameters, sum(trained)),
        activation_bytes=_activation_bytes(module, start.transform.input_size, batch_size, config.model.dtype),
    )


def _check_augmentation(config: TrainConfig, start: StartingPoint) -> None:
    """Build the train transform.

    Raises:
        RequestError: timm does not know the automatic augmentation, or would leave out a part of it.
    """
    policy = config.augment.auto_augment
    pixels = TrainPixels(start.transform.input_size, start.transform.mean, config.augment, config.optim.seed)
    try:
        train_transform(pixels)
    except (AssertionError, ValueError, KeyError) as error:
        reason = str(error) or "timm does not know it"
        raise RequestError(f"augment.auto_augment = {policy!r}: {reason}; {AUGMENTATIONS}") from None
    # timm passes over a section that it does not know where that holds no number.
    for section in policy.split("-")[1:] if policy else []:
        if section not in TRANSFORM_SETS and (section.startswith("t") or not any(map(str.isdigit, section))):
            raise RequestError(f"augment.auto_augment = {policy!r}: timm does not know {section!r}; {AUGMENTATIONS}")


def _explain_lr(optim: OptimConfig) -> str:
    ratio = f"{optim.global_batch_size} / {LR_BASE_SIZE}"
    if not scales_lr_by_root(optim.opt):
        return f"{optim.lr:.3g} = {LR_BASE} x {ratio}, as timm scales it with the batch"
    return (
        f"{optim.lr:.3g} = {LR_BASE} x sqrt({ratio}), as timm scales it with the batch; "
        f"{optim.opt} mostly wants less, such as 1e-3"
    )


def _rates(
    optimizer: torch.optim.Optimizer, schedule: Any, num_epochs: int, steps_per_epoch: int
) -> list[tuple[int, float]]:
    shown = sorted({round(place * (num_epochs - 1) / NUM_RATES_SHOWN) for place in range(NUM_RATES_SHOWN + 1)})
    rates = []
    for epoch in shown:
        schedule.step_update(num_updates=epoch * steps_per_epoch)
        rates.append((epoch + 1, max(float(group["lr"]) for group in optimizer.param_groups)))
    return rates


def _state_bytes(config: TrainConfig, num_parameters: int, num_trained: int) -> int:
    num_copies = 2 if config.optim.ema_decay else 1
    return 4 * round(num_parameters * num_copies + num_trained * (1 + _values_per_parameter(config)))


def _values_per_parameter(config: TrainConfig) -> float:
    """What the optimizer keeps for each parameter, found by a step on a small matrix.

    Raises:
        RequestError: it makes no step.
    """
    small = nn.Linear(64, 64, bias=False)
    plain = config.optim.model_copy(update={"layer_decay": None})
    optimizer = make_optimizer(config.model_copy(update={"optim": plain}), small)
    small(torch.ones(1, 64)).sum().backward()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RequestError(f"optim.opt = {plain.opt}: timm has it, but it makes no step here: {error}") from None
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor)) / small.weight.numel()


def _activation_bytes(module: TimmModule, input_size: tuple[int, int], batch_size: int, precision: str) -> int:
    """What autograd saves in a forward pass, counted on two images without values, scaled to the batch."""
    parameters = {tensor.untyped_storage()._cdata for tensor in module.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.empty(2, 3, *input_size, device="meta"))
    values = sum(tensor.untyped_storage().nbytes() // 4 for key, tensor in saved.items() if key not in parameters)
    return values * BYTES_PER_VALUE[precision] * batch_size // 2
