"""The loop of one training worker. Every worker runs it; Ray Train starts them all anew where one is lost.

What is learnt goes on from the last checkpoint: model, average, optimizer and scaler from its file; order of the
images, augmentation, rate and every random draw from the step that it holds.
"""

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero
from torch import distributed

from pipelines.logs import log_to_stderr
from pipelines.models.build import TimmModule
from pipelines.training.augment import EvalPixels, Pixels, TrainPixels
from pipelines.training.batches import Order, SequentialOrder, ShareLoader
from pipelines.training.checkpoint import load_state, save_state, save_timm_directory
from pipelines.training.ingest import errors_of, iterate_shares, max_steps_per_dataset, split_among_workers
from pipelines.training.job import ImageSet, TrainJob
from pipelines.training.learner import Learner, Task
from pipelines.training.start import StartingPoint, build_module

log = logging.getLogger(__name__)

SCORE = "top1"
# What a checkpoint scores that was not measured: never the best.
NO_SCORE = -1.0


def train_worker(job: TrainJob) -> dict[str, Any]:
    """Learn until the last epoch's end; returns what came of it, the same on every worker."""
    log_to_stderr()
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    worker = Worker(job, ray.get(job.start))
    worker.resume()
    while worker.learner.step < worker.total_steps and worker.stopped_by is None:
        worker.learn_some()
    return {"history": worker.history, "failed": worker.failed, "stopped_by": worker.stopped_by}


class Worker:
    """One of the workers, with what it has learnt and measured.

    Attributes:
        learner: the model and what updates it.
        history: one record an epoch.
        failed: reason by id, of images that could not be had.
        stopped_by: why the run ends before its time, if it does.
    """

    def __init__(self, job: TrainJob, start: StartingPoint) -> None:
        context = ray.train.get_context()
        self.job, self.start, self.config = job, start, job.config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.steps_per_epoch = job.order.steps_per_epoch
        self.total_steps = self.steps_per_epoch * job.config.optim.epochs
        transform = start.transform
        task = Task(
            start.name.partition(".")[0],
            len(start.class_names),
            transform.mean,
            transform.std,
            self.steps_per_epoch,
        )
        device = ray.train.torch.get_device()
        module = build_module(job.config, start)
        self.learner = Learner(job.config, task, module, device, self.rank, self.world_size)
        self.history: list[dict[str, Any]] = []
        self.failed: dict[int, str] = {}
        self.stopped_by: str | None = None
        self._new_errors: dict[int, str] = {}
        self._loss_sum = 0.0
        self._epoch_started = time.monotonic()
        self._last_line = time.monotonic()
        self._validation: list[DataIterator] | None = None

    def resume(self) -> None:
        """Go on from the run's last checkpoint, if it has one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = load_state(Path(folder))
        self.learner.load_state(state["learner"])
        self.history, self.failed = state["history"], state["failed"]
        self._loss_sum = state["loss_sum"] if self.rank == 0 else 0.0
        if self.rank == 0:
            log.info("going on at step %d of %d", self.learner.step, self.total_steps)

    def learn_some(self) -> None:
        """The steps of one dataset, with what falls due at their ends."""
        first = self.learner.step
        num_steps = min(self.total_steps - first, max_steps_per_dataset(self.world_size))
        for share in self._training_shares(first, num_steps):
            self._loss_sum += self.learner.learn(share)
            self._new_errors |= errors_of(share)
            self._say_how_far()
            self._after_step()
            if self.stopped_by is not None:
                return

    def _after_step(self) -> None:
        every_steps = self.config.checkpoint.every_steps
        step = self.learner.step
        is_epoch_end = step % self.steps_per_epoch == 0
        if not is_epoch_end and (every_steps is None or step % every_steps):
            return
        self._gather_errors()
        self.learner.agree_on_statistics()
        if is_epoch_end:
            self._end_epoch()
        else:
            self._report({SCORE: NO_SCORE, "step": step}, is_best=False)

    def _end_epoch(self) -> None:
        epoch = self.learner.step // self.steps_per_epoch
        record: dict[str, Any] = {"epoch": epoch, "step": self.learner.step, "lr": self.learner.lr}
        record["train_loss"] = float(self._summed(torch.tensor([self._loss_sum]))[0]) / self.steps_per_epoch
        elapsed_s = time.monotonic() - self._epoch_started
        record["images_per_s"] = self.steps_per_epoch * self.config.optim.global_batch_size / elapsed_s
        if self.job.validation is not None:
            record |= self._measure(self.job.validation)
        self.history.append(record)
        is_best = final_score(self.history) is record
        self._loss_sum, self._epoch_started = 0.0, time.monotonic()
        if self.rank == 0:
            log.info("%s", _line(record, self.config.optim.epochs))
        self._report({SCORE: float(epoch), **record}, is_best)

    def _measure(self, validation: ImageSet) -> dict[str, Any]:
        """Top-1 and top-5 over the whole set, each image counted once."""
        sums: dict[str, torch.Tensor] = {}
        num_failed = 0
        for share in self._validation_shares(validation):
            num_failed += len(errors_of(share))
            for name, counts in self.learner.measure(share).items():
                sums[name] = sums.get(name, torch.zeros_like(counts)) + counts
        measured: dict[str, dict[str, float]] = {}
        for name, counts in sums.items():
            num_images, top1, top5, loss = self._summed(counts).tolist()
            num_images = max(num_images, 1)
            measured[name] = {"top1": top1 / num_images, "top5": top5 / num_images, "loss": loss / num_images}
        best = max(measured, key=lambda name: measured[name]["top1"])
        record: dict[str, Any] = {"top1": measured[best]["top1"], "top5": measured[best]["top5"], "of": best}
        for name, figures in measured.items():
            record |= {f"{name}_{figure}": value for figure, value in figures.items()}
        record["num_validation_failed"] = int(self._summed(torch.tensor([num_failed]))[0])
        return record

    def _report(self, metrics: dict[str, Any], is_best: bool) -> None:
        """Hand metrics and, from the first worker, a checkpoint to Ray Train; every worker has to come here."""
        loss_sum = float(self._summed(torch.tensor([self._loss_sum]))[0])
        if self.rank:
            ray.train.report(metrics)
            self._loss_sum = 0.0  # the first worker holds the sum from here on
            return
        self._loss_sum = loss_sum
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            state = {"learner": self.learner.state(), "history": self.history, "failed": self.failed}
            save_state(folder, state | {"loss_sum": loss_sum})
            if is_best:
                save_timm_directory(folder, self._best_module(), self.start.class_names, self.start.transform)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _best_module(self) -> TimmModule:
        average = self.learner.average
        if average is not None and self.history[-1].get("of", "average") == "average":
            return average.module
        return self.learner.module

    def _gather_errors(self) -> None:
        """Tell all workers of the images that each could not have, and stop where they are too many."""
        errors: list[dict[int, str]] = [self._new_errors]
        if self.world_size > 1:
            errors = [{}] * self.world_size
            distributed.all_gather_object(errors, self._new_errors)
        for found in errors:
            self.failed |= found
        self._new_errors = {}
        share_of_failed = len(self.failed) / self.job.train.num_images
        if share_of_failed > self.config.failure.max_fraction:
            first = next(iter(self.failed.values()))
            self.stopped_by = (
                f"{len(self.failed)} of {self.job.train.num_images} training images failed, more than "
                f"failure.max_fraction = {self.config.failure.max_fraction}; the first: {first}"
            )

    def _summed(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, as float64."""
        total = counts.double().to(self.learner.device)
        if self.world_size > 1:
            distributed.all_reduce(total)
        return total

    def _say_how_far(self) -> None:
        now = time.monotonic()
        if self.rank or now - self._last_line < self.config.logging.every_s:
            return
        self._last_line = now
        step = self.learner.step
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        rate = (within + 1) * self.config.optim.global_batch_size / (now - self._epoch_started)
        left_s = (self.total_steps - step) * self.config.optim.global_batch_size / rate
        log.info(
            "epoch %d of %d, step %d of %d, loss %.4f, %.1f images/s, %.0f s left",
            epoch + 1,
            self.config.optim.epochs,
            within + 1,
            self.steps_per_epoch,
            self._loss_sum * self.world_size / (within + 1),
            rate,
            left_s,
        )

    def _training_shares(self, first_step: int, num_steps: int) -> Iterator[dict[str, NDArray[Any]]]:
        transform, config = self.start.transform, self.config
        pixels = TrainPixels(transform.input_size, transform.mean, config.augment, config.optim.seed)
        num_rows = -(-config.optim.global_batch_size // self.world_size)
        loader = self._loader(self.job.order, num_rows, pixels)
        split = self._split(loader, self.job.train, first_step, num_steps, self.steps_per_epoch)
        return iterate_shares(split[self.rank], self.rank, first_step, self.steps_per_epoch)

    def _validation_shares(self, validation: ImageSet) -> Iterator[dict[str, NDArray[Any]]]:
        # As many images as a share of training: what fits there in memory fits here.
        batch_size = -(-self.config.optim.global_batch_size // self.world_size)
        order = SequentialOrder(validation.num_images, batch_size)
        num_steps = order.num_steps(self.world_size)
        if self._validation is None:
            loader = self._loader(
                order, batch_size, EvalPixels(self.start.transform, self.config.preprocess.max_pixels)
            )
            self._validation = self._split(loader, validation, 0, num_steps, num_steps)
        return iterate_shares(self._validation[self.rank], self.rank, 0, num_steps)

    def _loader(self, order: Order, num_rows: int, pixels: Pixels) -> ShareLoader:
        return ShareLoader(
            order,
            num_rows,
            pixels,
            self.start.transform.input_size,
            self.world_size,
            self.config.data.max_bytes,
            self.config.preprocess.max_pixels,
        )

    def _split(
        self, loader: ShareLoader, images: ImageSet, first_step: int, num_steps: int, steps_per_epoch: int
    ) -> list[DataIterator]:
        """One iterator a worker, made by the first worker and known to all."""
        reference = None
        if self.rank == 0:
            split = split_among_workers(
                loader, images.images, first_step, num_steps, steps_per_epoch, self.job.num_cpus_per_task
            )
            reference = [ray.put(split)]
            self._held = reference  # alive for as long as the others may ask for it
        (found,) = broadcast_from_rank_zero(reference)
        iterators: list[DataIterator] = ray.get(found)
        return iterators


def _line(record: dict[str, Any], num_epochs: int) -> str:
    text = f"epoch {record['epoch']} of {num_epochs} done: loss {record['train_loss']:.4f}"
    if "top1" in record:
        text += f", top-1 {record['top1']:.4f}, top-5 {record['top5']:.4f}"
    return f"{text}, {record['images_per_s']:.1f} images/s"


def final_score(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the best epoch: the highest top-1, or the last where nothing was measured.

    Of epochs that are equal it is the last, which is the one whose checkpoint Ray Train keeps.
    """
    return max(history, key=lambda record: (record.get(SCORE, 0.0), record["epoch"]), default={})


def mean_rate(history: list[dict[str, Any]]) -> float:
    """Images per second over all epochs, validation included."""
    return float(np.mean([record["images_per_s"] for record in history])) if history else 0.0
