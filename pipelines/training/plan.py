"""Plan of a run: steps, learning rates and memory, computed from config, images and model before Ray starts."""

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
    """Size of a run in numbers.

    Attributes:
        num_train: Number of training images.
        num_validation: Number of validation images; 0 for none.
        num_classes: Length of the logits.
        global_batch_size: Number of images per step, over all workers.
        batch_size_per_pass: Number of images in a worker's microbatch, at the smallest number of workers.
        steps_per_epoch: Number of global batches in an epoch.
        num_left_out: Number of images dropped in each epoch because they do not fill a batch.
        total_steps: Number of steps over all epochs.
        rates: Pairs of an epoch and the learning rate at its start.
        default_lr: Explanation of the default learning rate; None if `optim.lr` is set.
        num_parameters: Number of parameters of the model.
        num_trained: Number of parameters that are not frozen.
        state_bytes: Memory of a worker's weights, gradients, optimizer state and EMA.
        activation_bytes: Estimated memory of the activations that a worker keeps for the backward pass.
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
        """Estimated memory of one worker."""
        return self.state_bytes + self.activation_bytes

    def describe_memory_shortage(self, nodes: Sequence[Node], num_workers: int) -> str | None:
        """Return a warning if CPU workers may need more memory than the nodes have, or None if they fit."""
        largest, total = max(node.memory_bytes for node in nodes), sum(node.memory_bytes for node in nodes)
        if self.worker_bytes <= largest and num_workers * self.worker_bytes <= total:
            return None
        return (
            f"the workers may run out of memory: {num_workers} need about "
            f"{num_workers * self.worker_bytes / 2**30:.1f} GiB; the cluster has {total / 2**30:.1f} GiB, its largest "
            f"node {largest / 2**30:.1f} GiB. Lower optim.global_batch_size or preprocess.image_size, or raise "
            f"optim.grad_accum_steps"
        )

    def lines(self) -> Iterator[str]:
        """Yield the plan as log lines."""
        yield (
            f"images: {self.num_train:,} for training, {self.num_validation:,} for validation, "
            f"{self.num_classes:,} classes"
        )
        yield (
            f"global batch size: {self.global_batch_size:,}, at most {self.batch_size_per_pass:,} per worker and pass; "
            f"{self.steps_per_epoch:,} steps per epoch ({self.num_left_out:,} images left out of each), "
            f"{self.total_steps:,} in total"
        )
        rates = ", ".join(f"{rate:.3g} ({epoch})" for epoch, rate in self.rates)
        yield f"learning rate at the start of the epoch in parentheses: {rates}"
        if self.default_lr is not None:
            yield f"optim.lr is not set: {self.default_lr}"
        yield f"parameters: {self.num_parameters:,}, of which {self.num_trained:,} are trained"
        yield (
            f"memory per worker: about {self.worker_bytes / 2**30:.1f} GiB ({self.state_bytes / 2**30:.1f} for "
            f"weights, gradients, optimizer and EMA, {self.activation_bytes / 2**30:.1f} for activations)"
        )


def plan_training(config: TrainConfig, start: StartingPoint, num_train: int, num_validation: int) -> TrainPlan:
    """Build each part of the recipe on the meta device, and compute the plan.

    Raises:
        RequestError: A part of the recipe cannot be built, or there are fewer training images than one batch.
    """
    optim = config.optim
    sampler = EpochSampler(num_train, optim.global_batch_size, optim.seed)
    _check_augmentation(config, start)
    module = build_trainable_on_meta(config, start.name, len(start.class_names)).train()
    freeze(module, config)
    optimizer = make_optimizer(config, module)
    schedule = make_schedule(config, optimizer, sampler.steps_per_epoch)
    workers = config.scaling.num_workers
    min_workers = workers if isinstance(workers, int) else workers[0]
    batch_size = -(-optim.global_batch_size // (min_workers * optim.grad_accum_steps))
    trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return TrainPlan(
        num_train=num_train,
        num_validation=num_validation,
        num_classes=len(start.class_names),
        global_batch_size=optim.global_batch_size,
        batch_size_per_pass=batch_size,
        steps_per_epoch=sampler.steps_per_epoch,
        num_left_out=num_train - sampler.steps_per_epoch * optim.global_batch_size,
        total_steps=sampler.steps_per_epoch * optim.epochs,
        rates=_rates(optimizer, schedule, optim.epochs, sampler.steps_per_epoch),
        default_lr=None if optim.is_set("lr") else _explain_lr(optim),
        num_parameters=num_parameters,
        num_trained=sum(trained),
        state_bytes=_state_bytes(config, num_parameters, sum(trained)),
        activation_bytes=_activation_bytes(module, start.transform.input_size, batch_size, config.model.dtype),
    )


def _check_augmentation(config: TrainConfig, start: StartingPoint) -> None:
    """Check that timm can build the train transform.

    Raises:
        RequestError: timm does not know the automatic augmentation, or would ignore a part of it.
    """
    policy = config.augment.auto_augment
    pixels = TrainPixels(start.transform.input_size, start.transform.mean, config.augment, config.optim.seed)
    try:
        train_transform(pixels)
    except (AssertionError, ValueError, KeyError) as error:
        reason = str(error) or "timm does not know it"
        raise RequestError(f"augment.auto_augment = {policy!r}: {reason}; {AUGMENTATIONS}") from None
    # timm silently ignores an unknown section that does not contain a number.
    for section in policy.split("-")[1:] if policy else []:
        if section not in TRANSFORM_SETS and (section.startswith("t") or not any(map(str.isdigit, section))):
            raise RequestError(f"augment.auto_augment = {policy!r}: timm does not know {section!r}; {AUGMENTATIONS}")


def _explain_lr(optim: OptimConfig) -> str:
    ratio = f"{optim.global_batch_size} / {LR_BASE_SIZE}"
    if not scales_lr_by_root(optim.opt):
        return f"{optim.lr:.3g} = {LR_BASE} x {ratio}, timm's scaling with the batch size"
    return (
        f"{optim.lr:.3g} = {LR_BASE} x sqrt({ratio}), timm's scaling with the batch size; "
        f"{optim.opt} usually needs a lower rate, such as 1e-3"
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
    """Return the number of values that the optimizer keeps per parameter, measured by a step on a small matrix.

    Raises:
        RequestError: The optimizer fails to make a step.
    """
    small = nn.Linear(64, 64, bias=False)
    plain = config.optim.model_copy(update={"layer_decay": None})
    optimizer = make_optimizer(config.model_copy(update={"optim": plain}), small)
    small(torch.ones(1, 64)).sum().backward()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RequestError(f"optim.opt = {plain.opt}: the optimizer failed in its first step: {error}") from None
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor)) / small.weight.numel()


def _activation_bytes(module: TimmModule, input_size: tuple[int, int], batch_size: int, precision: str) -> int:
    """Estimate the bytes that autograd saves in a forward pass, from two images on the meta device."""
    parameters = {tensor.untyped_storage()._cdata for tensor in module.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.empty(2, 3, *input_size, device="meta"))
    values = sum(tensor.untyped_storage().nbytes() // 4 for key, tensor in saved.items() if key not in parameters)
    return values * BYTES_PER_VALUE[precision] * batch_size // 2
