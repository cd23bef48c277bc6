"""Sampler of the training set: one permutation of the whole set per epoch, derived from seed and epoch alone.

The sampler has no state to checkpoint. Any worker can compute the batch of any step, so a run can resume in the middle
of an epoch, even with another number of workers.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import RequestError


@dataclass(frozen=True)
class EpochSampler:
    """Shuffling sampler of a training set. Ids are positions in the set, dense from 0.

    Attributes:
        num_images: Number of images in the set.
        global_batch_size: Number of images per step, over all workers.
        seed: Seed of the run.

    Raises:
        RequestError: The set is smaller than one global batch.
    """

    num_images: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_images < self.global_batch_size:
            raise RequestError(
                f"{self.num_images} training images are fewer than one batch of optim.global_batch_size = "
                f"{self.global_batch_size}: lower it, or add images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in the set. Each epoch drops the remainder, which differs between epochs."""
        return self.num_images // self.global_batch_size

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the ids of one global batch.

        Args:
            epoch: Epoch, from 0.
            step: Step within the epoch, from 0.
        """
        start = step * self.global_batch_size
        return _permutation(self.num_images, self.seed, epoch)[start : start + self.global_batch_size]

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return the ids of one worker's part of a global batch. Sizes differ by at most one between workers."""
        return np.array_split(self.batch(epoch, step), world_size)[rank]


@functools.lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Philox is counter-based: its stream is the same on every machine and in every version of NumPy.
    permutation = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_images)
    permutation.setflags(write=False)
    return permutation
