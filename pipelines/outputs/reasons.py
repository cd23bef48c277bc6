"""Counts of failed rows by reason."""

from collections import Counter

import pyarrow as pa

# Messages may contain sizes or request ids. Beyond this number of distinct reasons, new ones are counted by kind only.
MAX_REASONS = 10_000


def reasons_of(failed: pa.Table) -> list[str]:
    """Return `kind: message` for each row of a `failed-*.parquet` table."""
    pairs = zip(failed["error_kind"].to_pylist(), failed["error_message"].to_pylist())
    return [f"{kind}: {message}" for kind, message in pairs]


def count_reasons(counts: Counter[str], more: Counter[str]) -> None:
    """Add `more` to `counts` in place, keeping at most about `MAX_REASONS` distinct reasons."""
    for reason, count in more.items():
        is_kept = reason in counts or len(counts) < MAX_REASONS
        counts[reason if is_kept else reason.partition(":")[0] + ": other reasons"] += count
