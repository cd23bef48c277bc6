"""Plot of a training run: loss, top-1 and learning rate over the epochs."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.training.history import EMA, MODEL

SIZE_INCHES = (9, 9)
DOTS_PER_INCH = 120


def draw_curves(records: list[dict[str, Any]], steps_per_epoch: int) -> bytes:
    """Plot the records of `metrics.jsonl` and return the PNG.

    Args:
        records: Records as `TrainingLog` keeps them.
        steps_per_epoch: Number of steps in an epoch, to convert steps to the epochs of the horizontal axis.
    """
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    figure = Figure(SIZE_INCHES, layout="constrained")
    loss, top1, rate = figure.subplots(3, 1, sharex=True)
    _plot(loss, steps, "loss", "training, mean of a few seconds", steps_per_epoch, linewidth=0.7)
    _plot(loss, epochs, "train_loss", "training, mean of the epoch", steps_per_epoch, marker=".")
    for name, label in ((MODEL, "model"), (EMA, "EMA")):
        _plot(loss, epochs, f"{name}_loss", f"validation, {label}", steps_per_epoch, marker=".")
        _plot(top1, epochs, f"{name}_top1", label, steps_per_epoch, marker=".")
    _plot(rate, sorted(steps + epochs, key=lambda record: record["step"]), "lr", "learning rate", steps_per_epoch)
    for axes, title in ((loss, "Loss"), (top1, "Top-1 on the validation set"), (rate, "Learning rate")):
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    rate.set_xlabel("Epoch")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def _plot(axes: Axes, records: list[dict[str, Any]], key: str, label: str, steps_per_epoch: int, **style: Any) -> None:
    points = [(record["step"] / steps_per_epoch, record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points), label=label, **style)
