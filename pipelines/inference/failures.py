"""How many images a run may fail on, and what is said where there are more."""

from collections import Counter
from collections.abc import Iterable

from pipelines.errors import RunError
from pipelines.outputs.reasons import count_reasons

# Of the first few images of a run any share may fail by chance.
MIN_IMAGES = 1000
NUM_REASONS = 10


class FailureLimit:
    """Counts failed images by reason; stops a run that loses too many.

    Attributes:
        num_done: images with a row, failed ones included.
        reasons: how often each was given.
    """

    def __init__(self, max_fraction: float, num_inputs: int, num_done: int, reasons: Counter[str]) -> None:
        self._max_fraction = max_fraction
        self._min_images = min(MIN_IMAGES, num_inputs)
        self.num_done = num_done
        self.reasons: Counter[str] = Counter()
        count_reasons(self.reasons, reasons)

    @property
    def num_failed(self) -> int:
        """Of the images done."""
        return self.reasons.total()

    def add(self, num_ok: int, reasons: Iterable[str]) -> None:
        """Count what a write task reports."""
        before = self.num_failed
        count_reasons(self.reasons, Counter(reasons))
        self.num_done += num_ok + self.num_failed - before

    def commonest(self) -> str:
        """The commonest reasons, with their counts."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(NUM_REASONS))

    def check(self) -> None:
        """See whether the run may go on.

        Raises:
            RunError: more images failed than may.
        """
        if self.num_failed <= self._max_fraction * max(self.num_done, self._min_images):
            return
        raise RunError(
            f"{self.num_failed} of {self.num_done} images failed, more than failure.max_fraction = "
            f"{self._max_fraction}: {self.commonest()}. "
            "What is done stays; with a higher limit the run goes on from there"
        )
