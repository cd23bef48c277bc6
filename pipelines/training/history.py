"""What the epochs came to, and which of them was the best."""

from typing import Any

SCORE = "top1"
# What a checkpoint scores that was not measured: never the best.
NO_SCORE = -1.0


def final_score(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the best epoch: the highest top-1, or the last where nothing was measured.

    Of epochs that are equal it is the last, which is the one whose checkpoint Ray Train keeps.
    """
    return max(history, key=lambda record: (record.get(SCORE, 0.0), record["epoch"]), default={})


def explain_choice(record: dict[str, Any]) -> str:
    """Say which weights of an epoch are handed out, and why.

    Args:
        record: of an epoch with an EMA.
    """
    names = {"average": "the EMA", "model": "the model itself, not its EMA"}
    if SCORE in record:
        scores = f"top-1 {record['model_top1']:.4f} of the model, {record['average_top1']:.4f} of the EMA"
        return f"{names[record['of']]}: {scores}"
    if record["of"] == "average":
        return f"{names['average']}, without validation images to compare it with the model"
    return f"{names['model']}, which after {record['step']} steps is still an average over too many of them"


def mean_rate(history: list[dict[str, Any]]) -> float:
    """Images per second over the epochs, without validation and the epochs' checkpoints."""
    return sum(record["images_per_s"] for record in history) / len(history) if history else 0.0
