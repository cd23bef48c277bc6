"""What people look at: a line every few seconds, `metrics.jsonl`, and TensorBoard's events, under the output."""

import functools
import json
import logging
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from pipelines import run_record
from pipelines.config.train import TrainConfig
from pipelines.storage import uris
from pipelines.storage.filesystem import write_bytes

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class TrainingLog:
    """Kept by the first worker.

    Attributes:
        records: the lines of `metrics.jsonl`: `kind` (`step` or `epoch`), `step`, `epoch` and figures.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int) -> None:
        self.records: list[dict[str, Any]] = []
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._folder = tempfile.TemporaryDirectory()
        self._window: list[torch.Tensor] = []
        self._writer, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)
        self._since = self._epoch_since = time.monotonic()
        self._num_steps_of_epoch = 0
        self._is_warm = False

    @functools.cached_property
    def _events(self) -> SummaryWriter:
        return SummaryWriter(self._folder.name)

    def add_step(self, step: int, loss: torch.Tensor, lr: float) -> None:
        """Count a step; where it is time, say and keep how it goes. The first step is the warm-up of all rates.

        Args:
            step: done, over all epochs.
            loss: of the global batch, as far as this worker knows it: one value, on any device.
            lr: rate of the next step.
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
        mean_loss = float(torch.stack(self._window).mean())  # waits for the steps
        now = time.monotonic()
        rate = len(self._window) * optim.global_batch_size / (now - self._since)
        epoch, within = divmod(step - 1, self._steps_per_epoch)
        self._keep(
            {"kind": "step", "step": step, "epoch": epoch + 1, "loss": mean_loss, "lr": lr, "images_per_s": rate}
        )
        num_left = (self._steps_per_epoch * optim.epochs - step) * optim.global_batch_size
        log.info(
            "epoch %d of %d, step %d of %d, loss %.4f, rate %.3g, %.1f images/s, %s left",
            *(epoch + 1, optim.epochs, within + 1, self._steps_per_epoch),
            *(mean_loss, lr, rate, _duration(num_left / rate)),
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
        """Images per second since the epoch began, or since the run went on in it."""
        num_images = self._num_steps_of_epoch * self._config.optim.global_batch_size
        return num_images / (time.monotonic() - self._epoch_since)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Say and keep what an epoch came to."""
        self._keep({"kind": "epoch"} | record)
        text = f"epoch {record['epoch']} of {self._config.optim.epochs} done: loss {record['train_loss']:.4f}"
        if "top1" in record:
            text += f", top-1 {record['top1']:.4f}, top-5 {record['top5']:.4f}"
        log.info("%s, %.1f images/s", text, record["images_per_s"])
        self._window, self._num_steps_of_epoch = [], 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what was done beside learning: validation and the epoch's checkpoint."""
        self._since = self._epoch_since = time.monotonic()

    def upload(self, output_uri: str) -> None:
        """Write `metrics.jsonl` and this process's TensorBoard events, whole, under the output."""
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_bytes(uris.join(output_uri, METRICS_FILE), lines.encode())
        self._events.flush()
        for path in Path(self._folder.name).iterdir():
            write_bytes(uris.join(output_uri, f"tensorboard/{path.name}"), path.read_bytes())

    def _publish(self, figures: dict[str, Any]) -> None:
        """Write `_progress.json` beside the steps, unless the last time still takes."""
        if self._writing.done():
            content = {"is_running": True, **figures}
            self._writing = self._writer.submit(run_record.write_progress, self._config.output.uri, content)

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._events.add_scalar(f"{record['kind']}/{name}", value, record["step"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
