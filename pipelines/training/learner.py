"""Model, EMA, optimizer, schedule and loss, by timm's factories: one training step, one validation batch.

Nothing here depends on Ray. Where torch.distributed is initialized, DDP averages the gradients over the workers.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.config.train import TrainConfig
from pipelines.models.accelerators import choose_accelerator
from pipelines.models.build import TimmModule
from pipelines.models.layout import memory_format_for
from pipelines.models.normalize import Normalizer
from pipelines.runtime.cache import use_private_compiler_cache
from pipelines.training.batches import PADDING_ID
from pipelines.training.recipe import (
    batch_norms,
    freeze,
    is_settled,
    make_ema,
    make_loss,
    make_mixup,
    make_optimizer,
    make_schedule,
)
from pipelines.training.seeds import seed_generators

# fairseq's limit. A scale that low means that no gradient of the last dozens of steps was finite.
MIN_SCALE = 1e-4


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        architecture: timm's name, without a tag.
        num_classes: length of the logits.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        steps_per_epoch: global batches.
    """

    architecture: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps_per_epoch: int


class Learner:
    """The state of a training run on one worker.

    Attributes:
        module: timm's model, without wrappers.
        average: its exponential moving average, if there is one.
        step: updates made, over all epochs.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        module: TimmModule,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.task, self.device = config, task, device
        self.rank, self.world_size = rank, world_size
        self.step = 0
        self._layout = memory_format_for(task.architecture, device)
        self.module = module.to(device).to(memory_format=self._layout)
        freeze(self.module, config)
        self.average = make_ema(config, self.module)
        self._optimizer = make_optimizer(config, self.module)
        self._schedule = make_schedule(config, self._optimizer, task.steps_per_epoch)
        self._scaler = NativeScaler(device.type) if config.model.dtype == "float16" else None
        self._model: Any = self._wrapped()
        self._mixup = make_mixup(config, task.num_classes)
        self._erase = RandomErasing(config.augment.random_erase_prob, mode="pixel", device=str(device))
        self._train_loss = make_loss(config, is_soft=self._mixup is not None)
        self._normalize = Normalizer(task.mean, task.std).to(device)
        self._side_stream = choose_accelerator(device).side_stream()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    @property
    def is_scaled(self) -> bool:
        """True if a GradScaler skips updates whose gradients are not finite."""
        return self._scaler is not None

    @property
    def preferred_weights(self) -> str:
        """`average` or `model`: the weights to hand out where no validation compares them.

        An EMA over a large part of a short training is behind the model.
        """
        return "average" if self.average is not None and is_settled(self.average, self.step) else "model"

    def weights(self, name: str) -> TimmModule:
        """Return the module of `model` or `average`."""
        return self.module if self.average is None or name == "model" else self.average.module

    def is_broken(self) -> bool:
        """Check whether weights or statistics are NaN or infinite, or a GradScaler skips every update."""
        if self._scaler is not None and self._scaler.state_dict()["scale"] < MIN_SCALE:
            return True
        modules = [self.module] if self.average is None else [self.module, self.average.module]
        tensors = [tensor for module in modules for tensor in module.parameters()]
        tensors += [tensor for module in modules for norm in batch_norms(module) for tensor in norm.buffers()]
        return not torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()

    def learn(self, share: dict[str, NDArray[Any]]) -> torch.Tensor:
        """Make one step on this worker's local batch.

        Each image has the weight 1 / global_batch_size, whatever the number of workers and microbatches. Failed images
        have none.

        Args:
            share: `image` (rows x height x width x 3, uint8), `target`, `id`, `error`, as `LocalBatchLoader` makes it.

        Returns:
            This worker's part of the loss, to be summed over the workers: one float64 value on the device. Reading it
            waits for the step.
        """
        seed_generators(self.config.optim.seed, self.step, self.rank)  # for dropout, mixup and erasing
        self._set_mode()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        pieces = self._pieces(share)
        for position, (rows, weights) in enumerate(pieces):
            is_last = position == len(pieces) - 1
            with self._synchronized(is_last):
                loss = self._loss(share, rows, weights)
                self._backward(loss * self.world_size, is_last)  # DDP takes the mean over the workers
            total += loss.detach()
        self.step += 1
        if self.average is not None:
            self.average.update(self.module, step=self.step)
        self._schedule.step_update(num_updates=self.step)
        return total

    def agree_on_statistics(self) -> None:
        """Average the running statistics of batch norm over the workers: before measuring and saving."""
        if self.world_size > 1:
            for module in (self.module, *([self.average.module] if self.average is not None else [])):
                distribute_bn(module, self.world_size, reduce=True)

    @torch.inference_mode()
    def measure(self, share: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Count hits on one local batch, of the model and of its EMA, to be summed over batches and workers.

        Returns:
            For each of `model` and, where there is one, `average`: images, hits of top-1 and top-5 and the sum of the
            cross-entropy, as 4 float64 values. Failed images count nowhere.
        """
        good = _good_rows(share)
        modules = {"model": self.module} | ({"average": self.average.module} if self.average is not None else {})
        if not len(good):
            return {name: torch.zeros(4, dtype=torch.float64, device=self.device) for name in modules}
        images, target = self._images(share, good), self._target(share, good)
        return {name: self._count(module.eval(), images, target) for name, module in modules.items()}

    def state(self) -> dict[str, Any]:
        """All that goes on from here: tensors and plain values, loadable with `weights_only=True`."""
        return {
            "step": self.step,
            "state_dict": self.module.state_dict(),
            "state_dict_ema": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`. Schedule and generators follow from the step."""
        self.step = state["step"]
        self.module.load_state_dict(state["state_dict"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["state_dict_ema"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._schedule.step_update(num_updates=self.step)

    def _wrapped(self) -> Any:
        if self.config.model.sync_batch_norm:
            self.module = convert_sync_batchnorm(self.module)  # timm's keeps the activations that some norms hold
        if self.config.model.compile:
            use_private_compiler_cache()
        model: Any = torch.compile(self.module) if self.config.model.compile else self.module
        if self.world_size > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=device_ids)
        return model

    def _set_mode(self) -> None:
        self._model.train()
        if self.config.model.freeze_backbone or self.config.model.freeze_batch_norm:
            for module in batch_norms(self.module):
                module.eval()

    def _pieces(self, share: dict[str, NDArray[Any]]) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Split a local batch into microbatches.

        Every worker makes the same number of passes, whatever failed: synchronized batch norm waits for all workers in
        each pass. Batch norm needs two images a pass. Where too few images are good, some are passed more than once,
        each time with a part of their weight; where none is good, failed rows stand in and count nothing.

        Returns:
            The rows of each pass, and their weights, which are 1 for each good image.
        """
        num_passes = self.config.optim.grad_accum_steps
        good = _good_rows(share)
        rows = good if len(good) else np.arange(len(share["id"]))
        rows = np.resize(rows, max(len(rows), 2 * num_passes))
        weights = 1 / np.bincount(rows)[rows] if len(good) else np.zeros(len(rows))
        return list(zip(np.array_split(rows, num_passes), np.array_split(weights, num_passes)))

    def _synchronized(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        is_wrapped = isinstance(self._model, DistributedDataParallel)
        return self._model.no_sync() if is_wrapped and not is_last else contextlib.nullcontext()

    def _loss(
        self, share: dict[str, NDArray[Any]], rows: NDArray[np.int64], weights: NDArray[np.float64]
    ) -> torch.Tensor:
        """Return a pass's part of the mean loss over the global batch."""
        images, target = self._images(share, rows), self._target(share, rows)
        if self._mixup is not None:
            images, target = self._mixup(images, target)
        images = self._erase(images)
        with self._autocast():
            logits = self._model(images)
        global_batch_size = self.config.optim.global_batch_size
        if (weights == weights[0]).all():
            mean: torch.Tensor = self._train_loss(logits.float(), target)
            return mean * float(weights[0] * len(rows) / global_batch_size)
        # timm's losses have no weights.
        rows_of_one = zip(torch.split(logits.float(), 1), torch.split(target, 1), weights)
        parts: torch.Tensor = torch.stack([self._train_loss(row, goal) * weight for row, goal, weight in rows_of_one])
        return parts.sum() / global_batch_size

    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        clip_grad = self.config.optim.clip_grad
        if self._scaler is not None:
            self._scaler(loss, self._optimizer, clip_grad=clip_grad, parameters=parameters, need_update=is_last)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            if is_last and clip_grad is not None:
                dispatch_clip_grad(parameters, clip_grad)
            if is_last:
                self._optimizer.step()
        if is_last:
            self._optimizer.zero_grad(set_to_none=True)

    def _count(self, module: nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits = module(images)
        logits = logits.float()
        # Where the answer is no number, topk takes the first classes for the best.
        is_answer = torch.isfinite(logits).all(dim=1, keepdim=True)
        best = (logits.topk(min(5, logits.shape[1])).indices == target[:, None]) & is_answer
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        counts = [torch.tensor(len(target), device=self.device), best[:, 0].sum(), best.sum(), loss]
        return torch.stack([count.double() for count in counts])

    def _images(self, share: dict[str, NDArray[Any]], rows: NDArray[np.int64]) -> torch.Tensor:
        """Rows x 3 x height x width, normalized, in the model's layout."""
        images: torch.Tensor = self._normalize(self._side_stream.upload(torch.from_numpy(share["image"][rows])))
        return images.contiguous(memory_format=self._layout)

    def _target(self, share: dict[str, NDArray[Any]], rows: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(share["target"][rows]).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.config.model.dtype
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, precision))


def _good_rows(share: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    return np.flatnonzero((share["id"] != PADDING_ID) & (share["error"] == ""))
