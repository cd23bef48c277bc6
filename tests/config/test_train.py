"""Validation of the config of the job `train`."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config.parse import parse_config
from pipelines.config.train import OptimConfig, TrainConfig
from pipelines.errors import RequestError


def parse(*words: str) -> TrainConfig:
    return parse_config(TrainConfig, ["--data.train.uri", "x", "--output.uri", "y", *words])


def timms_default_lr(opt: str, global_batch_size: int) -> float:
    """Return the rate that timm's `train.py` derives from `--lr-base`, `--lr-base-size` and `--lr-base-scale`."""
    ratio = global_batch_size / 256
    return 0.1 * (ratio**0.5 if any(part in opt for part in ("ada", "lamb")) else ratio)


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "nadam", "lion", "momentum", "adafactor"])
@pytest.mark.parametrize("global_batch_size", [8, 256, 2048])
def test_default_learning_rate_equals_that_of_timm(opt: str, global_batch_size: int) -> None:
    found = parse("--optim.opt", opt, "--optim.global_batch_size", str(global_batch_size)).optim
    assert found.lr == pytest.approx(timms_default_lr(opt, global_batch_size))
    assert not found.is_set("lr")


def test_given_learning_rate_is_not_scaled() -> None:
    found = parse("--optim.lr", "0.3", "--optim.global_batch_size", "8").optim
    assert found.lr == 0.3
    assert found.is_set("lr")


@pytest.mark.parametrize("key", ["optim.lr", "optim.clip_grad", "optim.weight_decay", "augment.mixup"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e999"])
def test_infinite_and_nan_values_are_refused(key: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"{key} = .*finite number"):
        parse(f"--{key}", value)


def test_wrong_batch_size_gives_no_second_error_for_the_default_rate() -> None:
    with pytest.raises(RequestError) as caught:
        parse("--optim.global_batch_size", "many")
    assert "optim.global_batch_size" in str(caught.value)
    assert "optim.lr" not in str(caught.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"warmup_epochs": 5, "epochs": 3}, "warmup_epochs = 5 is longer"),
    ({"warmup_epochs": 1, "warmup_lr": 1.0, "lr": 0.1}, "warmup_lr = 1 is above"),
    ({"min_lr": 1.0, "lr": 0.1}, "min_lr = 1 is above"),
    ({"sched": "multistep"}, "needs decay_milestones"),
    ({"sched": "multistep", "decay_milestones": [9, 3]}, "ascending"),
    ({"sched": "multistep", "decay_milestones": [0]}, "from 1"),
    ({"momentum": 1.5}, "less than 1"),
]


@pytest.mark.parametrize(("optim", "message"), WRONG)
def test_inconsistent_schedule_is_refused(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimConfig.model_validate(optim)


@pytest.mark.parametrize("optim", [{"warmup_epochs": 1, "epochs": 1}, {"min_lr": 0.1, "lr": 0.1}, {"lr": 1e-30}])
def test_schedule_at_the_limits_is_accepted(optim: dict[str, Any]) -> None:
    assert OptimConfig.model_validate(optim)


@pytest.mark.parametrize(
    ("key", "value"), [("scale", "[1.0,0.08]"), ("scale", "[0.0,5.0]"), ("scale", "[0.5,5.0]"), ("ratio", "[2,1]")]
)
def test_invalid_crop_range_is_refused(key: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"augment.{key}"):
        parse(f"--augment.{key}", value)
