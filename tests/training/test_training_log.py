"""Progress of a training run: log lines, metrics, TensorBoard events and curves."""

import io
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from pipelines.config.train import TrainConfig
from pipelines.training.curves import draw_curves
from pipelines.training.training_log import TrainingLog


def config(output: Path) -> TrainConfig:
    sections = {"data": {"train": {"uri": "x"}}, "output": {"uri": str(output)}, "logging": {"every_s": 1e-9}}
    return TrainConfig.model_validate(sections | {"optim": {"epochs": 2, "global_batch_size": 8}})


def events_of(folder: Path) -> list[tuple[str, int, float]]:
    """Return tag, step and value of all events. A record is length, checksum, content and checksum."""
    found = []
    for path in folder.iterdir():
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += 12 + length + 4
    return found


@pytest.fixture
def two_epochs(tmp_path: Path) -> TrainingLog:
    log = TrainingLog(config(tmp_path), steps_per_epoch=3)
    for epoch in (1, 2):
        for step in range(3 * epoch - 2, 3 * epoch + 1):
            log.add_step(step, loss=torch.tensor(1 / step), lr=0.1)
        record: dict[str, Any] = {"epoch": epoch, "step": 3 * epoch, "lr": 0.1, "train_loss": 0.5, "images_per_s": 9.0}
        log.end_epoch(record | {"top1": 0.25 * epoch, "top5": 1.0, "model_top1": 0.25 * epoch, "model_loss": 0.4})
    return log


def test_upload_writes_all_metrics_and_events(two_epochs: TrainingLog, tmp_path: Path) -> None:
    two_epochs.upload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The first step is warm-up and is not recorded.
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] == "step"] == [
        ("step", s) for s in range(2, 7)
    ]
    assert [line["top1"] for line in lines if line["kind"] == "epoch"] == [0.25, 0.5]
    events = events_of(tmp_path / "tensorboard")
    assert ("epoch/top1", 6, 0.5) in events
    assert [step for tag, step, _ in events if tag == "step/loss"] == [2, 3, 4, 5, 6]


def test_resumed_run_keeps_the_earlier_lines(two_epochs: TrainingLog, tmp_path: Path) -> None:
    resumed = TrainingLog(config(tmp_path), steps_per_epoch=3)
    resumed.records = list(two_epochs.records)
    resumed.add_step(7, loss=torch.tensor(0.1), lr=0.1)
    resumed.add_step(8, loss=torch.tensor(0.1), lr=0.1)
    resumed.upload()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 3, 4, 5, 6, 6, 8]


def test_curves_are_drawn_as_a_png(two_epochs: TrainingLog) -> None:
    picture = Image.open(io.BytesIO(draw_curves(two_epochs.records, 3)))
    assert picture.format == "PNG"
    colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 100
    # Without validation, and without any record.
    assert draw_curves([record for record in two_epochs.records if record["kind"] == "step"], 3)
    assert draw_curves([], 3)


def test_progress_is_written_during_training(two_epochs: TrainingLog, tmp_path: Path) -> None:
    two_epochs.add_step(7, torch.tensor(0.5), lr=0.1)
    while not (tmp_path / "_progress.json").exists():
        time.sleep(0.01)
    progress = json.loads((tmp_path / "_progress.json").read_text())
    assert progress.items() >= {"is_running": True, "num_steps": 6}.items()
    assert progress["images_per_s"] > 0


def test_metrics_are_written_during_training(tmp_path: Path) -> None:
    log = TrainingLog(config(tmp_path), steps_per_epoch=3)
    log.add_step(1, torch.tensor(1.0), lr=0.1)
    log.add_step(2, torch.tensor(1.0), lr=0.1)
    log._writing.result(timeout=10)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 2
    assert ("step/loss", 2, 1.0) in events_of(tmp_path / "tensorboard")


def test_failed_metrics_write_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # blocks the file
    log = TrainingLog(config(tmp_path), steps_per_epoch=3)
    for step in (1, 2):
        log.add_step(step, torch.tensor(1.0), lr=0.1)
    log._writing.result()
    assert "metrics.jsonl could not be written" in caplog.text


def test_steps_skipped_by_a_grad_scaler_leave_no_nan(two_epochs: TrainingLog, tmp_path: Path) -> None:
    two_epochs.add_step(7, torch.tensor(float("nan")), lr=0.1)
    two_epochs.end_epoch({"epoch": 3, "step": 9, "lr": 0.1, "train_loss": None, "images_per_s": 9.0})
    two_epochs.upload()
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["loss"] is None
    assert draw_curves(two_epochs.records, 3)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not valid JSON")


def test_epoch_line_names_the_scored_weights(two_epochs: TrainingLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    record = {"epoch": 3, "step": 9, "lr": 0.1, "train_loss": 0.5, "images_per_s": 9.0, "top1": 0.5, "top5": 1.0}
    two_epochs.end_epoch(record | {"model_top1": 0.25, "average_top1": 0.5, "of": "average"})
    assert "top-1 0.5000, top-5 1.0000 (EMA)" in caplog.text
