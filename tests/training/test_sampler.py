import numpy as np
import pytest

from pipelines.errors import RequestError
from pipelines.training.sampler import EpochSampler

ORDER = EpochSampler(num_images=1003, global_batch_size=50, seed=7)


def ids_of(order: EpochSampler, epoch: int) -> list[int]:
    return [int(index) for step in range(order.steps_per_epoch) for index in order.batch(epoch, step)]


def test_an_epoch_holds_no_id_twice_and_all_but_the_last_incomplete_batch() -> None:
    ids = ids_of(ORDER, 0)
    assert len(ids) == len(set(ids)) == 1000
    assert set(ids) <= set(range(1003))


def test_epochs_differ_in_order_and_in_what_they_leave_out() -> None:
    orders = [ids_of(ORDER, epoch) for epoch in range(4)]
    assert len({tuple(ids) for ids in orders}) == 4
    assert len({frozenset(ids) for ids in orders}) > 1


def test_the_seed_alone_decides() -> None:
    assert ids_of(ORDER, 3) == ids_of(EpochSampler(1003, 50, 7), 3)
    assert ids_of(ORDER, 3) != ids_of(EpochSampler(1003, 50, 8), 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_workers_shares_make_the_global_batch(world_size: int) -> None:
    shares = [ORDER.share(1, 4, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == ORDER.batch(1, 4).tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_neighbours_in_the_manifest_are_spread_over_the_epoch() -> None:
    # A shuffle by blocks or through a buffer would keep neighbours together.
    position = np.empty(1003)
    permuted = np.concatenate([EpochSampler(1003, 1, 0).batch(0, step) for step in range(1003)])
    position[permuted] = np.arange(1003)
    assert np.abs(np.diff(position)).mean() == pytest.approx(1003 / 3, rel=0.1)


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(RequestError, match=r"49 training images make no batch of optim\.global_batch_size = 50"):
        EpochSampler(49, 50, 0)
