"""Bit set of manifest ids: 10^9 ids take 125 MB."""

import numpy as np
from numpy.typing import NDArray

# Number of bytes unpacked at a time, each of which takes eight bytes while unpacked.
CHUNK_BYTES = 1 << 20


class IdSet:
    """Set of ids from 0 to `size` - 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._bits = np.zeros(-(-size // 8), np.uint8)

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum(dtype=np.int64))

    def add(self, ids: NDArray[np.int64]) -> None:
        """Add ids. Ids that are already in the set are ignored.

        Raises:
            ValueError: An id is negative or not below `size`.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit into a set of size {self.size}")
        np.bitwise_or.at(self._bits, ids >> 3, np.uint8(0x80) >> (ids & 7).astype(np.uint8))

    def contains(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a boolean mask of the ids that are in the set."""
        return np.asarray(self._bits[ids >> 3] & (np.uint8(0x80) >> (ids & 7).astype(np.uint8)), np.bool_)

    def overlaps(self, ids: NDArray[np.int64]) -> bool:
        """Return whether any of the ids is in the set."""
        return bool(self.contains(ids).any())

    def missing(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the ids from `start` to `stop` - 1 that are not in the set, in ascending order."""
        first = start // 8
        flags = np.unpackbits(self._bits[first : -(-stop // 8)])
        return np.flatnonzero(flags[start - 8 * first : stop - 8 * first] == 0) + start

    def missing_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids at the given positions in the ascending sequence of ids that are not in the set.

        Args:
            positions: Positions in that sequence, in ascending order.
        """
        found = np.empty_like(positions)
        num_before = 0
        for start in range(0, self.size, 8 * CHUNK_BYTES):
            missing = self.missing(start, min(start + 8 * CHUNK_BYTES, self.size))
            first, last = np.searchsorted(positions, (num_before, num_before + len(missing)))
            found[first:last] = missing[positions[first:last] - num_before]
            num_before += len(missing)
        return found
