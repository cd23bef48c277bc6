"""Training loop of one worker. If a worker is lost, Ray Train restarts all of them.

A restarted run resumes from the last checkpoint. Model, EMA, optimizer and scaler are loaded from its file. The order
of the images, augmentation, learning rate and all random draws are derived from the step that it holds.
"""

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import distributed

from pipelines.outputs.lease import FENCE_AGE_S
from pipelines.runtime.logs import log_to_stderr
from pipelines.training.checkpoint import describe_model, load_state, save_state, save_timm_directory
from pipelines.training.divergence import NO_STEP, DivergenceMonitor
from pipelines.training.history import NO_SCORE, SCORE, best_record
from pipelines.training.ingest import errors_of
from pipelines.training.job import ImageSet, TrainJob
from pipelines.training.learner import Learner, Task
from pipelines.training.local_batches import LocalBatches
from pipelines.training.start import StartingPoint, build_module
from pipelines.training.training_log import TrainingLog

log = logging.getLogger(__name__)

# Gathering is a collective operation. At one step per second, a set of broken images is noticed within two minutes.
GATHER_ERRORS_EVERY_STEPS = 100
# Each check of the loss synchronizes with the GPU once.
CHECK_LOSS_EVERY_STEPS = 10


def train_worker(job: TrainJob) -> dict[str, Any]:
    """Train to the end of the last epoch and return the results, the same on every worker except for `metrics`."""
    log_to_stderr()
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    worker = Worker(job, ray.get(job.start))
    worker.resume()
    while worker.learner.step < worker.total_steps and worker.stopped_by is None:
        worker.train_next_dataset()
    return {
        "history": worker.history,
        "failed": worker.failed,
        "validation_failed": worker.validation_failed,
        "stopped_by": worker.stopped_by,
        "metrics": worker.log.records,
    }


class Worker:
    """Training worker: its learner, its metrics and its checkpoints.

    Attributes:
        learner: Model, optimizer and schedule.
        log: Metrics and log lines of the run, used on rank 0.
        history: Records of the epochs.
        failed: Errors of the training images that failed, by id.
        failed_in_epoch: Ids of the training images that failed in this epoch. After a resume, it covers only the part
            of the epoch since then.
        validation_failed: Errors of the images that failed in the last validation, by id.
        stopped_by: Reason to stop the run early; None while there is none.
    """

    def __init__(self, job: TrainJob, start: StartingPoint) -> None:
        context = ray.train.get_context()
        self.job, self.start, self.config = job, start, job.config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.steps_per_epoch = job.sampler.steps_per_epoch
        self.total_steps = self.steps_per_epoch * job.config.optim.epochs
        architecture = start.name.partition(".")[0]
        transform = start.transform
        task = Task(architecture, len(start.class_names), transform.mean, transform.std, self.steps_per_epoch)
        device = ray.train.torch.get_device()
        module = build_module(job.config, start)
        self.learner = Learner(job.config, task, module, device, self.rank, self.world_size)
        self.log = TrainingLog(job.config, self.steps_per_epoch, job.fence)
        self.history: list[dict[str, Any]] = []
        self.failed: dict[int, str] = {}
        self.failed_in_epoch: set[int] = set()
        self.validation_failed: dict[int, str] = {}
        self.stopped_by: str | None = None
        self._local_batches = LocalBatches(job, transform, self.rank, self.world_size)
        self._divergence = DivergenceMonitor(device, self.learner.is_scaled)
        self._has_checkpoint = False
        self._new_errors: dict[int, str] = {}
        self._losses = self._no_losses()

    def resume(self) -> None:
        """Load the last checkpoint of the run, if it has one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        self._has_checkpoint = True
        with checkpoint.as_directory() as folder:
            state = load_state(Path(folder))
        self.learner.load_state(state["learner"])
        self.history, self.failed = state["history"], state["failed"]
        self.validation_failed = state.get("validation_failed", {})
        self.log.records = state["metrics"]
        # Older checkpoints hold only the sum, which includes the losses of all steps.
        losses = state.get("losses") or [state["loss_sum"], self.learner.step % self.steps_per_epoch]
        if self.rank == 0:
            self._losses += torch.tensor(losses, dtype=torch.float64, device=self.learner.device)
        if self.rank == 0:
            log.info("resuming at step %d of %d", self.learner.step, self.total_steps)

    def train_next_dataset(self) -> None:
        """Train the steps of one Ray dataset, with the checkpoints and validations that fall due."""
        first = self.learner.step
        for local_batch in self._local_batches.training(first, self.total_steps - first):
            lr = self.learner.lr
            loss = self.learner.learn(local_batch)
            self._divergence.add(self.learner.step, loss, lr)
            is_finite = torch.isfinite(loss)
            self._losses += torch.stack([torch.where(is_finite, loss, 0.0), is_finite.double() / self.world_size])
            self._new_errors |= errors_of(local_batch)
            if self.rank == 0:
                # Local batches are random samples: the loss of one estimates the mean without an all-reduce per step.
                self.log.add_step(self.learner.step, loss * self.world_size, self.learner.lr)
            self._after_step()
            if self.stopped_by is not None:
                return

    def _after_step(self) -> None:
        self._check_fence(FENCE_AGE_S)
        every_steps = self.config.checkpoint.every_steps
        step = self.learner.step
        is_epoch_end = step % self.steps_per_epoch == 0
        is_checkpoint_due = is_epoch_end or (every_steps is not None and step % every_steps == 0)
        if is_checkpoint_due or step % CHECK_LOSS_EVERY_STEPS == 0:
            self._stop_if_diverged(is_checkpoint_due)
        if is_checkpoint_due or step % GATHER_ERRORS_EVERY_STEPS == 0:
            self._stop_if_too_many_failed()
        if not is_checkpoint_due or self.stopped_by is not None:
            return
        self.learner.sync_batch_norm_statistics()
        if is_epoch_end:
            self._end_epoch()
        else:
            self._report({SCORE: NO_SCORE, "step": step}, is_best=False)

    def _end_epoch(self) -> None:
        epoch = self.learner.step // self.steps_per_epoch
        record: dict[str, Any] = {"epoch": epoch, "step": self.learner.step, "lr": self.learner.lr}
        loss_sum, num_losses = self._all_reduce_sum(self._losses).tolist()
        record["train_loss"] = loss_sum / num_losses if num_losses else None
        record["images_per_s"] = self.log.epoch_rate()
        if self.job.validation is not None:
            record |= self._measure(self.job.validation)
            if self.stopped_by is not None:
                return
        elif self.learner.ema is not None:
            record["of"] = self.learner.preferred_weights
        self.history.append(record)
        self._losses = self._no_losses()
        self.failed_in_epoch.clear()
        if self.rank == 0:
            self.log.end_epoch(record)
        self._report({SCORE: float(epoch), **record}, is_best=best_record(self.history) is record)
        self.log.restart_clock()

    def _measure(self, validation: ImageSet) -> dict[str, Any]:
        """Compute top-1, top-5 and loss over the whole set, counting each image once.

        Sets `stopped_by` if too many of the images failed, because the score of the others would mean little.
        """
        sums: dict[str, torch.Tensor] = {}
        errors: dict[int, str] = {}
        for local_batch in self._local_batches.validation(validation):
            errors |= dict(errors_of(local_batch))
            for name, counts in self.learner.measure(local_batch).items():
                sums[name] = sums.get(name, torch.zeros_like(counts)) + counts
        known, self.validation_failed = self.validation_failed, self._all_gather(errors)
        self.stopped_by = self._reason_to_stop("validation images", validation, self.validation_failed)
        if self.rank == 0 and self.stopped_by is None and self.validation_failed.keys() - known.keys():
            log.warning(
                "%s; the scores leave them out",
                self._describe_failed("validation images", validation, self.validation_failed),
            )
        record: dict[str, Any] = {"num_validation_failed": len(self.validation_failed)}
        for name, counts in sums.items():
            num_images, top1, top5, loss = self._all_reduce_sum(counts).tolist()
            record["num_validation_images"] = int(num_images)
            for figure, value in (("top1", top1), ("top5", top5), ("loss", loss)):
                # JSON has no NaN.
                record[f"{name}_{figure}"] = value / max(num_images, 1) if math.isfinite(value) else None
        best = max(sums, key=lambda name: record[f"{name}_top1"])
        return record | {"top1": record[f"{best}_top1"], "top5": record[f"{best}_top5"], "of": best}

    def _report(self, metrics: dict[str, Any], is_best: bool) -> None:
        """Report metrics to Ray Train, with a checkpoint from rank 0. A collective operation."""
        self._has_checkpoint = True
        losses = self._all_reduce_sum(self._losses)
        if self.rank:
            ray.train.report(metrics)
            self._losses = self._no_losses()  # rank 0 keeps the sum
            return
        self._losses = losses
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_state(folder, self._state())
            if is_best:
                module = self.learner.weights(self._chosen_weights())
                save_timm_directory(folder, module, self.start.class_names, self.start.transform)
            # Ray Train removes an older checkpoint for each new one. By now it may belong to another run.
            self._check_fence(max_age_s=0)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self.log.upload()

    def _check_fence(self, max_age_s: float) -> None:
        """Raise on rank 0 if another run has taken over the output."""
        if self.rank == 0 and self.job.fence is not None:
            self.job.fence.check(max_age_s)

    def _state(self) -> dict[str, Any]:
        return {
            "model": describe_model(self.start.name, self.start.class_names, self.start.transform),
            "learner": self.learner.state(),
            "handed_out": self._chosen_weights(),
            "history": self.history,
            "failed": self.failed,
            "validation_failed": self.validation_failed,
            "metrics": self.log.records,
            "losses": self._losses.tolist(),
        }

    def _chosen_weights(self) -> str:
        """Return the name of the weights to export: the better ones of the last validation, if there is one."""
        if self.job.validation is not None and self.history:
            return str(self.history[-1]["of"])
        return self.learner.preferred_weights

    def _stop_if_diverged(self, is_checkpoint_due: bool) -> None:
        """Set `stopped_by` on all workers, before a checkpoint is saved, if loss or weights are NaN or infinite."""
        first_bad_step = self._divergence.first_bad_step.clone()
        if self.world_size > 1:
            distributed.all_reduce(first_bad_step, op=distributed.ReduceOp.MIN)
        step = int(first_bad_step)
        if step != NO_STEP:
            what = f"the loss is NaN or infinite from step {step} of {self.total_steps} on"
        elif is_checkpoint_due and self._is_broken():
            step = self.learner.step
            what = f"weights or all of the latest gradients are NaN or infinite at step {step} of {self.total_steps}"
        else:
            return
        precision = self.config.model.dtype
        self.stopped_by = (
            f"{what}, at learning rate {self._divergence.lr_at(step):.3g}: try a smaller optim.lr, a longer "
            f"optim.warmup_epochs or optim.clip_grad"
            + (f", or another model.dtype than {precision}" if precision != "float32" else "")
            + (", with a new output.uri" if self._has_checkpoint else "")
        )

    def _is_broken(self) -> bool:
        return bool(self._all_reduce_sum(torch.tensor(self.learner.is_broken())))

    def _stop_if_too_many_failed(self) -> None:
        """Gather the training images that failed on any worker, and set `stopped_by` if they are too many."""
        found = self._all_gather(self._new_errors)
        self.failed |= found
        self.failed_in_epoch |= found.keys()
        self._new_errors = {}
        if self.stopped_by is None:
            errors = {index: self.failed[index] for index in self.failed_in_epoch}
            self.stopped_by = self._reason_to_stop("training images", self.job.train, errors)

    def _reason_to_stop(self, what: str, images: ImageSet, errors: dict[int, str]) -> str | None:
        """Return the reason to stop the run, or None if the failed images are within `failure.max_fraction`."""
        max_fraction = self.config.failure.max_fraction
        if len(errors) <= max_fraction * images.num_images:
            return None
        return f"{self._describe_failed(what, images, errors)}; that is more than failure.max_fraction = {max_fraction}"

    def _describe_failed(self, what: str, images: ImageSet, errors: dict[int, str]) -> str:
        first = min(errors)
        uri = ray.get(images.images)["uri"][first].as_py()
        return f"{len(errors)} of {images.num_images} {what} failed, the first: {uri}: {errors[first]}"

    def _all_gather(self, errors: dict[int, str]) -> dict[int, str]:
        """Return the errors of all workers, by id of the image."""
        if self.world_size == 1:
            return dict(errors)
        found: list[dict[int, str]] = [{}] * self.world_size
        distributed.all_gather_object(found, errors)
        return {index: error for one in found for index, error in one.items()}

    def _no_losses(self) -> torch.Tensor:
        """Return a zeroed sum and count of finite losses: 2 float64 values.

        Both add up to those of the global batches over all workers. They stay on the device, because reading the loss
        of each step would leave the GPU idle until the next step is queued.
        """
        return torch.zeros(2, dtype=torch.float64, device=self.learner.device)

    def _all_reduce_sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the sum over all workers, as float64."""
        total = counts.double().to(self.learner.device)
        if self.world_size > 1:
            distributed.all_reduce(total)
        return total
