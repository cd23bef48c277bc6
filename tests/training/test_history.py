"""Choice of the best epoch and of the weights to export."""

from typing import Any

import pytest

from pipelines.training.history import best_record, explain_choice

MEASURED = {"model_top1": 0.5, "average_top1": 0.75, "top1": 0.75, "of": "average"}


def test_best_epoch_has_the_highest_score_and_ties_go_to_the_last() -> None:
    history: list[dict[str, Any]] = [
        {"epoch": 1, "top1": 0.5},
        {"epoch": 2, "top1": 0.75},
        {"epoch": 3, "top1": 0.75},
        {"epoch": 4, "top1": 0},
    ]
    assert best_record(history)["epoch"] == 3
    assert best_record([{"epoch": 1}, {"epoch": 2}])["epoch"] == 2
    assert best_record([]) == {}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (MEASURED, "exporting the EMA of epoch 2: top-1 is 0.7500 for the EMA, 0.5000 for the model"),
        (MEASURED | {"of": "model"}, "exporting the model of epoch 2: top-1 is"),
        ({"of": "average"}, "exporting the EMA of epoch 2: there are no validation images"),
        ({"of": "model"}, "exporting the model of epoch 2: its EMA averages over too many of the 36 steps"),
    ],
)
def test_choice_of_weights_is_explained(record: dict[str, Any], expected: str) -> None:
    assert explain_choice({"epoch": 2, "step": 36, **record}).startswith(expected)
