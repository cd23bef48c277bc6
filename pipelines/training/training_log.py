"""Progress of a training run: log lines, and `metrics.jsonl` and TensorBoard events in the output."""

import functools
import json
import logging
import math
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from pipelines.config.train import TrainConfig
from pipelines.outputs import Output
from pipelines.outputs.lease import Fence
from pipelines.storage.filesystem import write_bytes
from pipelines.training.history import EMA

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# Metrics and events are rewritten as a whole and grow, so that writing them may take at most a twentieth of the time.
MIN_INTERVAL_PER_WRITE_TIME = 20


class TrainingLog:
    """Metrics of a run, kept by rank 0.

    Attributes:
        records: Lines of `metrics.jsonl`, with `kind` (`step` or `epoch`), `step`, `epoch` and metrics.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int, fence: Fence | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._output, self._check = Output(config.output.uri), fence.check if fence else None
        self._folder = tempfile.TemporaryDirectory()
        self._window: list[torch.Tensor] = []
        # A single thread writes in order, so that an older version never overwrites a newer one.
        self._writer, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)
        self._quiet_until = 0.0
        self._since = self._epoch_since = time.monotonic()
        self._num_steps_of_epoch = 0
        self._is_warm = False

    @functools.cached_property
    def _events(self) -> SummaryWriter:
        return SummaryWriter(self._folder.name)

    def add_step(self, step: int, loss: torch.Tensor, lr: float) -> None:
        """Count a step, and log and record the metrics every `logging.every_s`. The first step is warm-up.

        Args:
            step: Number of steps made, over all epochs.
            loss: Estimated loss of the global batch: one value, on any device.
            lr: Learning rate of the next step.
        """
        now = time.monotonic()
        if not self._is_warm:
            self._is_warm, self._since, self._epoch_since = True, now, now
            return
        self._window.append(loss)
        self._num_steps_of_epoch += 1
        if now - self._since < self._config.logging.every_s:
            return
        optim = self._config.optim
        mean_loss = _mean_of_finite(self._window)  # waits until the device has finished the steps
        now = time.monotonic()
        rate = len(self._window) * optim.global_batch_size / (now - self._since)
        epoch, within = divmod(step - 1, self._steps_per_epoch)
        self._record(
            {"kind": "step", "step": step, "epoch": epoch + 1, "loss": mean_loss, "lr": lr, "images_per_s": rate}
        )
        num_left = (self._steps_per_epoch * optim.epochs - step) * optim.global_batch_size
        log.info(
            "epoch %d of %d, step %d of %d, loss %s, learning rate %.3g, %.1f images/s, %s left",
            *(epoch + 1, optim.epochs, within + 1, self._steps_per_epoch),
            *(_format_loss(mean_loss), lr, rate, _format_duration(num_left / rate)),
        )
        self._publish(
            {
                "step": step,
                "num_steps": self._steps_per_epoch * optim.epochs,
                "loss": mean_loss,
                "images_per_s": round(rate, 3),
                "left_s": round(num_left / rate, 1),
            }
        )
        self._window, self._since = [], now

    def epoch_rate(self) -> float:
        """Return the images per second since the epoch began or the run resumed."""
        num_images = self._num_steps_of_epoch * self._config.optim.global_batch_size
        return num_images / (time.monotonic() - self._epoch_since)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Log and store the record of an epoch."""
        self._record({"kind": "epoch"} | record)
        text = f"epoch {record['epoch']} of {self._config.optim.epochs} done: loss {_format_loss(record['train_loss'])}"
        if "top1" in record:
            text += f", top-1 {record['top1']:.4f}, top-5 {record['top5']:.4f}"
        if f"{EMA}_top1" in record:
            text += f" ({'EMA' if record['of'] == EMA else 'model'})"
        log.info("%s, %.1f images/s", text, record["images_per_s"])
        self._window, self._num_steps_of_epoch = [], 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock, so that rates leave out validation and the end-of-epoch checkpoint."""
        self._since = self._epoch_since = time.monotonic()

    def upload(self) -> None:
        """Write `metrics.jsonl` and this process's TensorBoard events to the output, as a whole."""
        self._writer.submit(self._upload, list(self.records)).result()

    def _upload(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        write_bytes(self._output.uri_of(METRICS_FILE), lines.encode(), self._check)
        self._events.flush()
        for path in Path(self._folder.name).iterdir():
            write_bytes(self._output.uri_of(f"tensorboard/{path.name}"), path.read_bytes(), self._check)

    def _publish(self, progress: dict[str, Any]) -> None:
        """Write `_progress.json`, metrics and events in a thread, unless the previous write is still running."""
        if self._writing.done():
            content = {"is_running": True, **progress}
            self._writing = self._writer.submit(self._write_all, content, list(self.records))

    def _write_all(self, progress: dict[str, Any], records: list[dict[str, Any]]) -> None:
        self._output.write_progress(progress, self._check)
        started = time.monotonic()
        if started < self._quiet_until:
            return
        try:
            self._upload(records)
        except Exception as error:  # file systems raise many types; a failure is fatal only at the next checkpoint
            log.warning("%s could not be written; retrying later: %s", METRICS_FILE, error)
        now = time.monotonic()
        self._quiet_until = now + MIN_INTERVAL_PER_WRITE_TIME * (now - started)

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._events.add_scalar(f"{record['kind']}/{name}", value, record["step"])


def _mean_of_finite(losses: list[torch.Tensor]) -> float | None:
    """Return the mean without the steps that a GradScaler skipped, or None if there is no other step."""
    values = torch.stack(losses)
    mean = float(values[values.isfinite()].mean())
    return mean if math.isfinite(mean) else None


def _format_loss(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
