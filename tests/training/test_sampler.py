"""Shuffling sampler of the training set."""

import numpy as np
import pytest

from pipelines.errors import RequestError
from pipelines.training.sampler import EpochSampler

SAMPLER = EpochSampler(num_images=1003, global_batch_size=50, seed=7)


def ids_of(sampler: EpochSampler, epoch: int) -> list[int]:
    return [int(index) for step in range(sampler.steps_per_epoch) for index in sampler.batch(epoch, step)]


def test_epoch_repeats_no_id_and_drops_only_the_incomplete_batch() -> None:
    ids = ids_of(SAMPLER, 0)
    assert len(ids) == len(set(ids)) == 1000
    assert set(ids) <= set(range(1003))


def test_epochs_differ_in_order_and_in_dropped_images() -> None:
    orders = [ids_of(SAMPLER, epoch) for epoch in range(4)]
    assert len({tuple(ids) for ids in orders}) == 4
    assert len({frozenset(ids) for ids in orders}) > 1


def test_permutation_depends_only_on_seed_and_epoch() -> None:
    assert ids_of(SAMPLER, 3) == ids_of(EpochSampler(1003, 50, 7), 3)
    assert ids_of(SAMPLER, 3) != ids_of(EpochSampler(1003, 50, 8), 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_local_batches_partition_the_global_batch(world_size: int) -> None:
    local_batches = [SAMPLER.local_batch(1, 4, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(local_batches).tolist() == SAMPLER.batch(1, 4).tolist()
    assert max(map(len, local_batches)) - min(map(len, local_batches)) <= 1


def test_shuffle_is_global() -> None:
    # A shuffle by blocks or through a buffer would keep neighbours together.
    position = np.empty(1003)
    permuted = np.concatenate([EpochSampler(1003, 1, 0).batch(0, step) for step in range(1003)])
    position[permuted] = np.arange(1003)
    assert np.abs(np.diff(position)).mean() == pytest.approx(1003 / 3, rel=0.1)


def test_set_smaller_than_a_batch_is_rejected() -> None:
    message = r"49 training images are fewer than one batch of optim\.global_batch_size = 50"
    with pytest.raises(RequestError, match=message):
        EpochSampler(49, 50, 0)
