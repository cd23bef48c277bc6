"""Detection of a loss that has become NaN or infinite, without making a GPU wait at every step."""

import collections

import torch

# torch's GradScaler halves its scale and skips the update when gradients overflow. From its first scale, 65,536, this
# many skips in a row lead below 1: then the loss itself overflows, whatever the scale.
MAX_SKIPPED_STEPS = 20
# Later than every step.
NO_STEP = 2**62
NUM_RATES_KEPT = 200


class DivergenceMonitor:
    """Finds the first step of a loss that stays NaN or infinite. Losses are looked at on their device."""

    def __init__(self, device: torch.device, is_scaled: bool) -> None:
        """Start to watch.

        Args:
            device: of the losses.
            is_scaled: whether a GradScaler skips updates whose gradients are not finite. Then a single bad loss is
                harmless.
        """
        self._limit = MAX_SKIPPED_STEPS if is_scaled else 1
        self._num_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._began = torch.full((), NO_STEP, dtype=torch.int64, device=device)
        self._found = self._began.clone()
        self._rates: collections.deque[tuple[int, float]] = collections.deque(maxlen=NUM_RATES_KEPT)

    @property
    def first_bad_step(self) -> torch.Tensor:
        """The step from which on losses were bad, or `NO_STEP`: one int64 value on the device."""
        return self._found

    def add(self, step: int, loss: torch.Tensor, lr: float) -> None:
        """Look at one step.

        Args:
            step: counted from 1, over all epochs.
            loss: one value.
            lr: learning rate of that step.
        """
        is_bad = ~torch.isfinite(loss)
        self._began = torch.where(is_bad & (self._num_in_a_row == 0), step, self._began)
        self._num_in_a_row = (self._num_in_a_row + 1) * is_bad
        is_found = (self._found == NO_STEP) & (self._num_in_a_row >= self._limit)
        self._found = torch.where(is_found, self._began, self._found)
        self._rates.append((step, lr))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of one of the last `NUM_RATES_KEPT` steps."""
        return dict(self._rates)[step]
