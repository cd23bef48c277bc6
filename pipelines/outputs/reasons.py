"""Counts of the reasons in failed rows."""

from collections import Counter

import pyarrow as pa

# Messages may hold sizes or request ids of a store. Beyond this many reasons, new ones are counted by their kind.
MAX_REASONS = 10_000


def reasons_of(failed: pa.Table) -> list[str]:
    """Return `kind: message` of each row of a `failed-*.parquet` table."""
    pairs = zip(failed["error_kind"].to_pylist(), failed["error_message"].to_pylist())
    return [f"{kind}: {message}" for kind, message in pairs]


def count_reasons(counts: Counter[str], more: Counter[str]) -> None:
    """Add to counts that stay small, however many different reasons there are."""
    for reason, count in more.items():
        is_kept = reason in counts or len(counts) < MAX_REASONS
        counts[reason if is_kept else reason.partition(":")[0] + ": other reasons"] += count
