"""The best epoch, and the weights that are exported of it."""

from typing import Any

import pytest

from pipelines.training.history import explain_choice, final_score

MEASURED = {"model_top1": 0.5, "average_top1": 0.75, "top1": 0.75, "of": "average"}


def test_best_epoch_has_the_highest_score_and_is_the_last_of_equals() -> None:
    history: list[dict[str, Any]] = [
        {"epoch": 1, "top1": 0.5},
        {"epoch": 2, "top1": 0.75},
        {"epoch": 3, "top1": 0.75},
        {"epoch": 4, "top1": 0},
    ]
    assert final_score(history)["epoch"] == 3
    assert final_score([{"epoch": 1}, {"epoch": 2}])["epoch"] == 2
    assert final_score([]) == {}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (MEASURED, "exporting the EMA of epoch 2: top-1 is 0.7500 of the EMA, 0.5000 of the model"),
        (MEASURED | {"of": "model"}, "exporting the model of epoch 2: top-1 is"),
        ({"of": "average"}, "exporting the EMA of epoch 2: without validation images"),
        ({"of": "model"}, "exporting the model of epoch 2: its EMA averages over too many of the 36 steps"),
    ],
)
def test_choice_of_weights_is_explained(record: dict[str, Any], said: str) -> None:
    assert explain_choice({"epoch": 2, "step": 36, **record}).startswith(said)
