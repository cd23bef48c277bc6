"""Records of the epochs, and the choice of the best one."""

from typing import Any

SCORE = "top1"
# Score of a checkpoint within an epoch, which no validation measured. It is never the best.
NO_SCORE = -1.0
# Names of the two sets of weights, as checkpoints, metrics and summaries store them.
MODEL = "model"
EMA = "average"


def best_record(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the epoch with the highest top-1, or of the last epoch if there is no validation.

    Ties go to the last epoch, because Ray Train keeps its checkpoint.
    """
    return max(history, key=lambda record: (record.get(SCORE, 0.0), record["epoch"]), default={})


def explain_choice(record: dict[str, Any]) -> str:
    """Explain in one line which weights of an epoch are exported, and why.

    Args:
        record: Record of an epoch of a run with an EMA.
    """
    epoch, is_ema = record["epoch"], record["of"] == EMA
    if SCORE in record:
        scores = f"top-1 is {record[f'{EMA}_top1']:.4f} for the EMA, {record[f'{MODEL}_top1']:.4f} for the model"
        return f"exporting the {'EMA' if is_ema else 'model'} of epoch {epoch}: {scores}"
    if is_ema:
        return f"exporting the EMA of epoch {epoch}: there are no validation images to compare it with the model"
    return f"exporting the model of epoch {epoch}: its EMA averages over too many of the {record['step']} steps"


def mean_rate(history: list[dict[str, Any]]) -> float:
    """Return the mean images per second of the epochs, excluding validation and end-of-epoch checkpoints."""
    return sum(record["images_per_s"] for record in history) / len(history) if history else 0.0
