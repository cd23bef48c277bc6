"""The loop of one training worker. Every worker runs it; Ray Train starts them all anew where one is lost.

What is learnt goes on from the last checkpoint: model, average, optimizer and scaler from its file; order of the
images, augmentation, rate and every random draw from the step that it holds.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import distributed

from pipelines.logs import log_to_stderr
from pipelines.models.build import TimmModule
from pipelines.training.checkpoint import describe_model, load_state, save_state, save_timm_directory
from pipelines.training.history import NO_SCORE, SCORE, final_score
from pipelines.training.ingest import errors_of, max_steps_per_dataset
from pipelines.training.job import ImageSet, TrainJob
from pipelines.training.learner import Learner, Task
from pipelines.training.log import TrainingLog
from pipelines.training.shares import WorkerShares
from pipelines.training.start import StartingPoint, build_module

log = logging.getLogger(__name__)

# All workers have to meet for it; at a step a second, a hopeless set is noticed within two minutes.
GATHER_ERRORS_EVERY_STEPS = 100


def train_worker(job: TrainJob) -> dict[str, Any]:
    """Learn until the last epoch's end; returns what came of it, the same on every worker but for `metrics`."""
    log_to_stderr()
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    worker = Worker(job, ray.get(job.start))
    worker.resume()
    while worker.learner.step < worker.total_steps and worker.stopped_by is None:
        worker.learn_some()
    return {
        "history": worker.history,
        "failed": worker.failed,
        "stopped_by": worker.stopped_by,
        "metrics": worker.log.records,
    }


class Worker:
    """One of the workers, with what it has learnt and measured.

    Attributes:
        learner: the model and what updates it.
        log: what the first worker says and keeps.
        history: one record an epoch.
        failed: reason by id, of images that could not be had.
        failed_in_epoch: ids of those of this epoch, or of what a restarted run has seen of it.
        stopped_by: why the run ends before its time, if it does.
    """

    def __init__(self, job: TrainJob, start: StartingPoint) -> None:
        context = ray.train.get_context()
        self.job, self.start, self.config = job, start, job.config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.steps_per_epoch = job.order.steps_per_epoch
        self.total_steps = self.steps_per_epoch * job.config.optim.epochs
        architecture = start.name.partition(".")[0]
        transform = start.transform
        task = Task(architecture, len(start.class_names), transform.mean, transform.std, self.steps_per_epoch)
        device = ray.train.torch.get_device()
        module = build_module(job.config, start)
        self.learner = Learner(job.config, task, module, device, self.rank, self.world_size)
        self.log = TrainingLog(job.config, self.steps_per_epoch)
        self.history: list[dict[str, Any]] = []
        self.failed: dict[int, str] = {}
        self.failed_in_epoch: set[int] = set()
        self.stopped_by: str | None = None
        self._shares = WorkerShares(job, transform, self.rank, self.world_size)
        self._new_errors: dict[int, str] = {}
        self._loss_sum = self._no_loss()

    def resume(self) -> None:
        """Go on from the run's last checkpoint, if it has one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = load_state(Path(folder))
        self.learner.load_state(state["learner"])
        self.history, self.failed = state["history"], state["failed"]
        self.log.records = state["metrics"]
        self._loss_sum = self._no_loss() + (state["loss_sum"] if self.rank == 0 else 0.0)
        if self.rank == 0:
            log.info("going on at step %d of %d", self.learner.step, self.total_steps)

    def learn_some(self) -> None:
        """The steps of one dataset, with what falls due at their ends."""
        first = self.learner.step
        num_steps = min(self.total_steps - first, max_steps_per_dataset(self.world_size))
        for share in self._shares.training(first, num_steps):
            loss = self.learner.learn(share)
            self._loss_sum += loss
            self._new_errors |= errors_of(share)
            if self.rank == 0:
                # The loss of the others is not asked for at each step; shares are drawn at random.
                self.log.add_step(self.learner.step, loss * self.world_size, self.learner.lr)
            self._after_step()
            if self.stopped_by is not None:
                return

    def _after_step(self) -> None:
        every_steps = self.config.checkpoint.every_steps
        step = self.learner.step
        is_epoch_end = step % self.steps_per_epoch == 0
        is_checkpoint_due = is_epoch_end or (every_steps is not None and step % every_steps == 0)
        if is_checkpoint_due or step % GATHER_ERRORS_EVERY_STEPS == 0:
            self._gather_errors()
        if not is_checkpoint_due:
            return
        self.learner.agree_on_statistics()
        if is_epoch_end:
            self._end_epoch()
        else:
            self._report({SCORE: NO_SCORE, "step": step}, is_best=False)

    def _end_epoch(self) -> None:
        epoch = self.learner.step // self.steps_per_epoch
        record: dict[str, Any] = {"epoch": epoch, "step": self.learner.step, "lr": self.learner.lr}
        record["train_loss"] = float(self._summed(self._loss_sum)) / self.steps_per_epoch
        record["images_per_s"] = self.log.epoch_rate()
        if self.job.validation is not None:
            record |= self._measure(self.job.validation)
        self.history.append(record)
        self._loss_sum = self._no_loss()
        self.failed_in_epoch.clear()
        if self.rank == 0:
            self.log.end_epoch(record)
        self._report({SCORE: float(epoch), **record}, is_best=final_score(self.history) is record)
        self.log.restart_clock()

    def _measure(self, validation: ImageSet) -> dict[str, Any]:
        """Top-1 and top-5 over the whole set, each image counted once."""
        sums: dict[str, torch.Tensor] = {}
        num_failed = 0
        for share in self._shares.validation(validation):
            num_failed += len(errors_of(share))
            for name, counts in self.learner.measure(share).items():
                sums[name] = sums.get(name, torch.zeros_like(counts)) + counts
        record: dict[str, Any] = {"num_validation_failed": int(self._summed(torch.tensor([num_failed]))[0])}
        for name, counts in sums.items():
            num_images, top1, top5, loss = self._summed(counts).tolist()
            record["num_validation_images"] = int(num_images)
            for figure, value in (("top1", top1), ("top5", top5), ("loss", loss)):
                record[f"{name}_{figure}"] = value / max(num_images, 1)
        best = max(sums, key=lambda name: record[f"{name}_top1"])
        return record | {"top1": record[f"{best}_top1"], "top5": record[f"{best}_top5"], "of": best}

    def _report(self, metrics: dict[str, Any], is_best: bool) -> None:
        """Hand metrics and, from the first worker, a checkpoint to Ray Train; every worker has to come here."""
        loss_sum = float(self._summed(self._loss_sum))
        if self.rank:
            ray.train.report(metrics)
            self._loss_sum = self._no_loss()  # the first worker holds the sum from here on
            return
        self._loss_sum = self._no_loss() + loss_sum
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_state(folder, self._state())
            if is_best:
                save_timm_directory(folder, self._best_module(), self.start.class_names, self.start.transform)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self.log.upload(self.config.output.uri)

    def _state(self) -> dict[str, Any]:
        return {
            "model": describe_model(self.start.name, self.start.class_names, self.start.transform),
            "learner": self.learner.state(),
            "history": self.history,
            "failed": self.failed,
            "metrics": self.log.records,
            "loss_sum": float(self._loss_sum),
        }

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
            self.failed_in_epoch |= found.keys()
        self._new_errors = {}
        num_failed, num_images = len(self.failed_in_epoch), self.job.train.num_images
        if num_failed > self.config.failure.max_fraction * num_images:
            first = self.failed[min(self.failed_in_epoch)]
            self.stopped_by = (
                f"{num_failed} of {num_images} training images failed in an epoch, more than "
                f"failure.max_fraction = {self.config.failure.max_fraction}; the first: {first}"
            )

    def _no_loss(self) -> torch.Tensor:
        """Sums stay on the device: a GPU that is asked for each step's loss waits for the next step to be sent."""
        return torch.zeros((), dtype=torch.float64, device=self.learner.device)

    def _summed(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, as float64."""
        total = counts.double().to(self.learner.device)
        if self.world_size > 1:
            distributed.all_reduce(total)
        return total
