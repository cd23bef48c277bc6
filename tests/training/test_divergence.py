"""Detection of NaN and infinite losses."""

import math

import pytest
import torch

from pipelines.training.divergence import MAX_SKIPPED_STEPS, NO_STEP, DivergenceMonitor

CPU = torch.device("cpu")


def first_bad_step(losses: list[float], is_scaled: bool = False) -> int:
    monitor = DivergenceMonitor(CPU, is_scaled)
    for step, loss in enumerate(losses, start=1):
        monitor.add(step, torch.tensor(loss, dtype=torch.float64), lr=0.1 * step)
    return int(monitor.first_bad_step)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_non_finite_loss_is_found(bad: float) -> None:
    assert first_bad_step([1.0, 0.5, bad, 0.4, bad]) == 3


def test_finite_losses_are_accepted() -> None:
    assert first_bad_step([1e30, 0.0, -5.0]) == NO_STEP


def test_single_bad_losses_are_accepted_with_a_grad_scaler() -> None:
    assert first_bad_step([math.inf, 1.0, math.nan, math.nan, 1.0] * 20, is_scaled=True) == NO_STEP


def test_many_consecutive_bad_losses_are_found_with_a_grad_scaler() -> None:
    losses = [1.0, math.nan, 1.0, *[math.nan] * MAX_SKIPPED_STEPS, 1.0]
    assert first_bad_step(losses, is_scaled=True) == 4
    assert first_bad_step(losses[:-2], is_scaled=True) == NO_STEP


def test_learning_rate_of_a_recent_step_is_kept() -> None:
    monitor = DivergenceMonitor(CPU, is_scaled=False)
    for step in range(1, 1000):
        monitor.add(step, torch.tensor(1.0), lr=step / 1000)
    assert monitor.lr_at(990) == 0.99
