"""Records of the epochs, and the best of them."""

from typing import Any

SCORE = "top1"
# What a checkpoint scores that was not measured: never the best.
NO_SCORE = -1.0


def final_score(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the best epoch: the highest top-1, or the last epoch where nothing was measured.

    Of equal epochs, the last is the best: Ray Train keeps its checkpoint.
    """
    return max(history, key=lambda record: (record.get(SCORE, 0.0), record["epoch"]), default={})


def explain_choice(record: dict[str, Any]) -> str:
    """Say which weights of an epoch are exported, and why.

    Args:
        record: of an epoch with an EMA.
    """
    epoch, is_ema = record["epoch"], record["of"] == "average"
    if SCORE in record:
        scores = f"top-1 is {record['average_top1']:.4f} of the EMA, {record['model_top1']:.4f} of the model"
        return f"exporting the {'EMA' if is_ema else 'model'} of epoch {epoch}: {scores}"
    if is_ema:
        return f"exporting the EMA of epoch {epoch}: without validation images, nothing compares it with the model"
    return f"exporting the model of epoch {epoch}: its EMA averages over too many of the {record['step']} steps"


def mean_rate(history: list[dict[str, Any]]) -> float:
    """Images per second over the epochs, without validation and the epochs' checkpoints."""
    return sum(record["images_per_s"] for record in history) / len(history) if history else 0.0
