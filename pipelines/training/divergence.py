"""Detection of NaN and infinite losses, without a GPU synchronization in every step."""

import collections

import torch

# torch's GradScaler halves its scale and skips the update when gradients overflow. After this many skips in a row, the
# scale has fallen from its initial 65,536 to less than 1, so the loss itself overflows.
MAX_SKIPPED_STEPS = 20
# Sentinel for "no bad step". It is larger than any step, so that a minimum over the workers ignores it.
NO_STEP = 2**62
NUM_RATES_KEPT = 200


class DivergenceMonitor:
    """Monitor that finds the step from which the loss is permanently NaN or infinite. Losses stay on their device."""

    def __init__(self, device: torch.device, is_scaled: bool) -> None:
        """Create a monitor that has seen no losses.

        Args:
            device: Device of the losses.
            is_scaled: True if a GradScaler skips updates whose gradients are not finite, which makes a single bad loss
                harmless.
        """
        self._limit = MAX_SKIPPED_STEPS if is_scaled else 1
        self._num_consecutive = torch.zeros((), dtype=torch.int64, device=device)
        self._candidate = torch.full((), NO_STEP, dtype=torch.int64, device=device)
        self._found = self._candidate.clone()
        self._rates: collections.deque[tuple[int, float]] = collections.deque(maxlen=NUM_RATES_KEPT)

    @property
    def first_bad_step(self) -> torch.Tensor:
        """First step of the bad losses, or `NO_STEP`: one int64 value on the device."""
        return self._found

    def add(self, step: int, loss: torch.Tensor, lr: float) -> None:
        """Add the loss of one step.

        Args:
            step: Step, counted from 1 over all epochs.
            loss: Loss of the step, one value.
            lr: Learning rate of the step.
        """
        is_bad = ~torch.isfinite(loss)
        self._candidate = torch.where(is_bad & (self._num_consecutive == 0), step, self._candidate)
        self._num_consecutive = (self._num_consecutive + 1) * is_bad
        is_found = (self._found == NO_STEP) & (self._num_consecutive >= self._limit)
        self._found = torch.where(is_found, self._candidate, self._found)
        self._rates.append((step, lr))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of one of the last `NUM_RATES_KEPT` steps."""
        return dict(self._rates)[step]
