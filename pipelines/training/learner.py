"""Model, EMA, optimizer, schedule and loss from timm's factories, with one training step and one validation batch.

This module does not depend on Ray. With several workers, torch.distributed has to be initialized; DDP then averages
the gradients over them.
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
from pipelines.training.history import EMA, MODEL
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

# fairseq's limit. The scale only falls that low if the gradients of the last dozens of steps were not finite.
MIN_SCALE = 1e-4


@dataclass(frozen=True)
class Task:
    """Model dimensions, normalization and epoch length of a run.

    Attributes:
        architecture: timm's name of the architecture, without a tag.
        num_classes: Length of the logits.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        steps_per_epoch: Number of global batches in an epoch.
    """

    architecture: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps_per_epoch: int


class Learner:
    """Training state of one worker.

    Attributes:
        module: timm's model, without wrappers.
        ema: Exponential moving average of its weights, if the config asks for one.
        step: Number of updates made, over all epochs.
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
        self.ema = make_ema(config, self.module)
        self._optimizer = make_optimizer(config, self.module)
        self._schedule = make_schedule(config, self._optimizer, task.steps_per_epoch)
        self._scaler = NativeScaler(device.type) if config.model.dtype == "float16" else None
        self._model: Any = self._wrap_model()
        self._mixup = make_mixup(config, task.num_classes)
        self._erase = RandomErasing(config.augment.random_erase_prob, mode="pixel", device=str(device))
        self._train_loss = make_loss(config, is_soft=self._mixup is not None)
        self._normalize = Normalizer(task.mean, task.std).to(device)
        self._side_stream = choose_accelerator(device).side_stream()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    @property
    def is_scaled(self) -> bool:
        """True if a GradScaler skips updates whose gradients are not finite."""
        return self._scaler is not None

    @property
    def preferred_weights(self) -> str:
        """Name of the weights to export, `EMA` or `MODEL`, if there is no validation to compare them.

        In a short run, an EMA averages over a large part of the steps and lags behind the model.
        """
        return EMA if self.ema is not None and is_settled(self.ema, self.step) else MODEL

    def weights(self, name: str) -> TimmModule:
        """Return the module of the weights called `MODEL` or `EMA`."""
        return self.module if self.ema is None or name == MODEL else self.ema.module

    def is_broken(self) -> bool:
        """Return whether weights or statistics are NaN or infinite, or the GradScaler skips every update."""
        if self._scaler is not None and self._scaler.state_dict()["scale"] < MIN_SCALE:
            return True
        modules = [self.module] if self.ema is None else [self.module, self.ema.module]
        tensors = [tensor for module in modules for tensor in module.parameters()]
        tensors += [tensor for module in modules for norm in batch_norms(module) for tensor in norm.buffers()]
        return not torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()

    def learn(self, local_batch: dict[str, NDArray[Any]]) -> torch.Tensor:
        """Make one step on this worker's local batch.

        Each image has the weight 1 / global_batch_size, whatever the number of workers and microbatches. Failed images
        have the weight 0.

        Args:
            local_batch: `image` (rows x height x width x 3, uint8), `target`, `id` and `error`, as `LocalBatchLoader`
                returns them.

        Returns:
            This worker's part of the loss, to be summed over the workers: one float64 value on the device. Reading it
            waits for the step.
        """
        seed_generators(self.config.optim.seed, self.step, self.rank)  # for dropout, mixup and erasing
        self._set_mode()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        microbatches = self._microbatches(local_batch)
        for position, (rows, weights) in enumerate(microbatches):
            is_last = position == len(microbatches) - 1
            with self._gradient_sync(is_last):
                loss = self._loss(local_batch, rows, weights)
                self._backward(loss * self.world_size, is_last)  # DDP averages over the workers
            total += loss.detach()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.module, step=self.step)
        self._schedule.step_update(num_updates=self.step)
        return total

    def sync_batch_norm_statistics(self) -> None:
        """Average the running statistics of batch norm over the workers. Call it before validating and saving."""
        if self.world_size > 1:
            for module in (self.module, *([self.ema.module] if self.ema is not None else [])):
                distribute_bn(module, self.world_size, reduce=True)

    @torch.inference_mode()
    def measure(self, local_batch: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Evaluate the model and its EMA on one local batch.

        Returns:
            For `MODEL` and, if there is one, `EMA`: the number of images, the top-1 and top-5 hits and the sum of the
            cross-entropy, as 4 float64 values to be summed over batches and workers. Failed images are left out.
        """
        good = _good_rows(local_batch)
        modules = {MODEL: self.module} | ({EMA: self.ema.module} if self.ema is not None else {})
        if not len(good):
            return {name: torch.zeros(4, dtype=torch.float64, device=self.device) for name in modules}
        images, target = self._images(local_batch, good), self._target(local_batch, good)
        return {name: self._count(module.eval(), images, target) for name, module in modules.items()}

    def state(self) -> dict[str, Any]:
        """Return the state to resume from: tensors and plain values, loadable with `weights_only=True`."""
        return {
            "step": self.step,
            "state_dict": self.module.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a result of `state()`. Schedule and random generators are derived from the step."""
        self.step = state["step"]
        self.module.load_state_dict(state["state_dict"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._schedule.step_update(num_updates=self.step)

    def _wrap_model(self) -> Any:
        if self.config.model.sync_batch_norm:
            self.module = convert_sync_batchnorm(self.module)  # unlike torch's, timm's keeps fused activations
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

    def _microbatches(
        self, local_batch: dict[str, NDArray[Any]]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Split a local batch into microbatches.

        Every worker runs the same number of microbatches, whatever failed, because synchronized batch norm waits for
        all workers in each forward pass. Batch norm needs at least two images per pass. If there are too few good
        images, some are used several times with a fraction of their weight. If there is none, failed rows take their
        place with the weight 0.

        Returns:
            Rows and weights of each microbatch. The weights of a good image sum to 1.
        """
        num_microbatches = self.config.optim.grad_accum_steps
        good = _good_rows(local_batch)
        rows = good if len(good) else np.arange(len(local_batch["id"]))
        rows = np.resize(rows, max(len(rows), 2 * num_microbatches))
        weights = 1 / np.bincount(rows)[rows] if len(good) else np.zeros(len(rows))
        return list(zip(np.array_split(rows, num_microbatches), np.array_split(weights, num_microbatches)))

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which DDP all-reduces the gradients of the last microbatch only."""
        is_wrapped = isinstance(self._model, DistributedDataParallel)
        return self._model.no_sync() if is_wrapped and not is_last else contextlib.nullcontext()

    def _loss(
        self, local_batch: dict[str, NDArray[Any]], rows: NDArray[np.int64], weights: NDArray[np.float64]
    ) -> torch.Tensor:
        """Return a microbatch's part of the mean loss over the global batch."""
        images, target = self._images(local_batch, rows), self._target(local_batch, rows)
        if self._mixup is not None:
            images, target = self._mixup(images, target)
        images = self._erase(images)
        with self._autocast():
            logits = self._model(images)
        global_batch_size = self.config.optim.global_batch_size
        if (weights == weights[0]).all():
            mean: torch.Tensor = self._train_loss(logits.float(), target)
            return mean * float(weights[0] * len(rows) / global_batch_size)
        # timm's losses do not accept weights per image.
        per_image = zip(torch.split(logits.float(), 1), torch.split(target, 1), weights)
        losses: torch.Tensor = torch.stack([self._train_loss(row, goal) * weight for row, goal, weight in per_image])
        return losses.sum() / global_batch_size

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
        # topk ranks the first classes highest if the logits are NaN, which must not count as a hit.
        is_finite = torch.isfinite(logits).all(dim=1, keepdim=True)
        hits = (logits.topk(min(5, logits.shape[1])).indices == target[:, None]) & is_finite
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        counts = [torch.tensor(len(target), device=self.device), hits[:, 0].sum(), hits.sum(), loss]
        return torch.stack([count.double() for count in counts])

    def _images(self, local_batch: dict[str, NDArray[Any]], rows: NDArray[np.int64]) -> torch.Tensor:
        """Return rows x 3 x height x width, normalized, in the model's memory format."""
        uploaded = self._side_stream.upload(torch.from_numpy(local_batch["image"][rows]))
        images: torch.Tensor = self._normalize(uploaded)
        return images.contiguous(memory_format=self._layout)

    def _target(self, local_batch: dict[str, NDArray[Any]], rows: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(local_batch["target"][rows]).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.config.model.dtype
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, precision))


def _good_rows(local_batch: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    return np.flatnonzero((local_batch["id"] != PADDING_ID) & (local_batch["error"] == ""))
