"""Limit on the fraction of images that may fail in a run."""

from collections import Counter
from collections.abc import Iterable

from pipelines.errors import RunError
from pipelines.outputs.reasons import count_reasons

# The limit counts as if at least this many images were done: among a few images, any fraction may fail by chance.
MIN_IMAGES = 1000
MAX_SHOWN_REASONS = 10


class FailureLimit:
    """Counter of failed images that stops a run in which too many fail.

    Attributes:
        num_done: Number of images with a row, failed ones included.
        reasons: Number of failed images by reason.
    """

    def __init__(self, max_fraction: float, num_inputs: int, num_done: int, reasons: Counter[str]) -> None:
        self._max_fraction = max_fraction
        self._min_images = min(MIN_IMAGES, num_inputs)
        self.num_done = num_done
        self.reasons: Counter[str] = Counter()
        count_reasons(self.reasons, reasons)

    @property
    def num_failed(self) -> int:
        """Number of images that failed."""
        return self.reasons.total()

    def add(self, num_ok: int, reasons: Iterable[str]) -> None:
        """Count the rows of one write task.

        Args:
            num_ok: Number of good rows.
            reasons: Reason of each failed row.
        """
        before = self.num_failed
        count_reasons(self.reasons, Counter(reasons))
        self.num_done += num_ok + self.num_failed - before

    def summarize(self) -> str:
        """Return the most common reasons with their counts, as text."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(MAX_SHOWN_REASONS))

    def check(self) -> None:
        """Check that the run may continue.

        Raises:
            RunError: More images failed than the limit allows.
        """
        if self.num_failed <= self._max_fraction * max(self.num_done, self._min_images):
            return
        raise RunError(
            f"{self.num_failed} of {self.num_done} images failed, more than failure.max_fraction = "
            f"{self._max_fraction}: {self.summarize()}. "
            "Committed rows are kept: raise failure.max_fraction to continue from there"
        )
