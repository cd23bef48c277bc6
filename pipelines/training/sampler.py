"""Which image is seen when: a permutation of the whole set for each epoch, known from seed and epoch alone.

Nothing of it needs to be stored: any worker of any group finds the batch of any step, so that training goes on in the
middle of an epoch, with another number of workers if need be.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import RequestError


@dataclass(frozen=True)
class EpochSampler:
    """The order of a training set. Ids are positions in the set, dense from 0.

    Attributes:
        num_images: in the set.
        global_batch_size: images a step, over all workers.
        seed: of the run.

    Raises:
        RequestError: not one batch can be made of the set.
    """

    num_images: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_images < self.global_batch_size:
            raise RequestError(
                f"{self.num_images} training images make no batch of optim.global_batch_size = {self.global_batch_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the set; an epoch leaves out what remains, other images each time."""
        return self.num_images // self.global_batch_size

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The ids of one global batch.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
        """
        start = step * self.global_batch_size
        return _permutation(self.num_images, self.seed, epoch)[start : start + self.global_batch_size]

    def share(self, epoch: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The ids of one worker's share of a global batch; shares differ by one id at most."""
        return np.array_split(self.batch(epoch, step), world_size)[rank]


@functools.lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Philox is counter-based: its stream is the same on every machine and in every version of NumPy.
    permutation = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_images)
    permutation.setflags(write=False)
    return permutation
