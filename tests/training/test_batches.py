"""Local batches: loaded directly, and streamed through Ray Data."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from cluster.local.ray_head import RayHead
from pipelines.config.train import AugmentConfig
from pipelines.images.decode import decode_rgb
from pipelines.images.transform import EvalTransform
from pipelines.inputs.files import FilesReader
from pipelines.runtime.ray_session import ray_session
from pipelines.training import ingest
from pipelines.training.augment import EvalPixels, TrainPixels
from pipelines.training.batches import PADDING_ID, LocalBatchLoader, LocalBatchTask, Sampler, SequentialSampler
from pipelines.training.ingest import errors_of, iterate_local_batches, plan_steps_per_task, split_among_workers
from pipelines.training.sampler import EpochSampler

SIZE = (32, 32)
MEAN = (0.5, 0.5, 0.5)
EVAL = EvalPixels(EvalTransform(SIZE, 1.0, "center", "bicubic", MEAN, MEAN), 10**8)
TRAIN = TrainPixels(SIZE, MEAN, AugmentConfig(auto_augment="rand-m7-mstd0.5-inc1"), seed=3)


@pytest.fixture(scope="module")
def images(photographs: Path) -> pa.Table:
    """24 images, the sixth of which does not exist."""
    paths = [str(path) for path in sorted(photographs.iterdir())[:24]]
    paths[5] = "/absent.jpg"
    return pa.table({"uri": paths, "target": pa.array(range(100, 124), pa.int64())})


def loader(sampler: Sampler, num_rows: int, world_size: int, pixels: Any = EVAL) -> LocalBatchLoader:
    limits = {"max_bytes": 10**8, "max_pixels": 10**8}
    return LocalBatchLoader(sampler, num_rows, pixels, SIZE, world_size, reader=FilesReader(), **limits)


def photograph(images: pa.Table, index: int) -> Image.Image:
    return decode_rgb(Path(images["uri"][index].as_py()).read_bytes(), 10**8)


def test_local_batch_holds_pixels_targets_and_errors(images: pa.Table) -> None:
    local_batch = loader(SequentialSampler(24, 8), 8, 2).load(images, epoch=0, step=0, rank=0)
    assert local_batch["id"].tolist() == list(range(8))
    assert local_batch["target"].tolist() == list(range(100, 108))
    numbers = {name: local_batch[name] for name in ("epoch", "step", "rank", "id", "target")}
    assert {values.dtype for values in numbers.values()} == {np.dtype(np.int64)}
    assert local_batch["image"].dtype == np.uint8
    assert [(index, error.partition(":")[0]) for index, error in errors_of(local_batch)] == [(5, "not_found")]
    assert not local_batch["image"][5].any()
    for index in (0, 4, 7):
        np.testing.assert_array_equal(local_batch["image"][index], EVAL(photograph(images, index), 0, index))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_sequential_sampler_covers_each_image_once_for_any_world_size(world_size: int) -> None:
    sampler = SequentialSampler(1001, 16)
    seen = [
        sampler.local_batch(0, step, rank, world_size).tolist()
        for step in range(sampler.num_steps(world_size))
        for rank in range(world_size)
    ]
    assert sorted(index for ids in seen for index in ids) == list(range(1001))


def test_short_local_batches_are_padded(images: pa.Table) -> None:
    local_batch = loader(SequentialSampler(24, 10), 10, 2).load(images, epoch=0, step=1, rank=0)
    assert local_batch["id"].tolist() == [20, 21, 22, 23] + [PADDING_ID] * 6
    assert local_batch["image"].shape == (10, *SIZE, 3)


def test_augmentation_depends_only_on_seed_epoch_and_id(images: pa.Table) -> None:
    image = photograph(images, 0)
    drawn = TRAIN(image, 1, 0)
    assert drawn.shape == (*SIZE, 3)
    np.random.seed(99)  # as other code in the process may do
    np.testing.assert_array_equal(TRAIN(image, 1, 0), drawn)
    other = TrainPixels(SIZE, MEAN, TRAIN.augment, seed=4)
    for changed in (TRAIN(image, 2, 0), TRAIN(image, 1, 1), other(image, 1, 0)):
        assert (changed != drawn).mean() > 0.5


def test_disabled_augmentation_only_resizes(images: pa.Table) -> None:
    plain = AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0, color_jitter=0, interpolation="bilinear")
    image = photograph(images, 0).resize((64, 64))
    expected = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(TrainPixels(SIZE, MEAN, plain, 0)(image, 0, 0), expected)


def test_local_batch_is_that_of_its_epoch_step_and_rank(images: pa.Table) -> None:
    sampler = EpochSampler(num_images=24, global_batch_size=6, seed=1)
    for epoch, step, rank in ((0, 0, 0), (2, 3, 1), (1, 0, 2)):
        local_batch = loader(sampler, 2, 3, TRAIN).load(images, epoch, step, rank)
        expected = sampler.local_batch(epoch, step, rank, 3).tolist()
        assert local_batch["id"].tolist() == expected
        for name, value in (("epoch", epoch), ("step", step), ("rank", rank)):
            assert local_batch[name].tolist() == [value, value]
        for position, index in enumerate(expected):
            if index != 5:
                drawn = TRAIN(photograph(images, index), epoch, index)
                np.testing.assert_array_equal(local_batch["image"][position], drawn)
                assert local_batch["error"][position] == ""


def test_tasks_follow_each_other_over_ranks_steps_and_epochs(images: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.training.batches.ray.get", lambda table: table)
    sampler = EpochSampler(num_images=24, global_batch_size=6, seed=1)  # 4 steps per epoch
    task = LocalBatchTask(loader(sampler, 3, 2), images, first_step=6, num_steps=5, steps_per_task=2, steps_per_epoch=4)
    found = [list(task({"id": np.array([place])})) for place in range(6)]
    places = [[tuple(int(batch[name][0]) for name in ("epoch", "step", "rank")) for batch in task] for task in found]
    assert places == [
        [(1, 2, 0), (1, 3, 0)],
        [(1, 2, 1), (1, 3, 1)],
        [(2, 0, 0), (2, 1, 0)],
        [(2, 0, 1), (2, 1, 1)],
        [(2, 2, 0)],
        [(2, 2, 1)],
    ]
    assert found[3][1]["id"].tolist() == sampler.local_batch(2, 1, 1, 2).tolist()


@pytest.mark.parametrize(
    ("num_rows", "size", "num_steps", "expected"),
    [
        (32, (224, 224), 10_000, 27),  # limited by the bytes of a task
        (32, (32, 32), 10_000, 32),  # by its rows
        (32, (32, 32), 100, 6),  # by the number of tasks
        (32, (32, 32), 5, 1),
        (2048, (224, 224), 10_000, 1),
    ],
)
def test_tasks_have_as_many_steps_as_fit(num_rows: int, size: tuple[int, int], num_steps: int, expected: int) -> None:
    limits = {"max_bytes": 1, "max_pixels": 1}
    sampler = SequentialSampler(1, 1)
    wide = LocalBatchLoader(sampler, num_rows, EVAL, size, 1, reader=FilesReader(), **limits)
    assert plan_steps_per_task(wide, num_steps) == expected


def test_dataset_has_a_bounded_number_of_tasks() -> None:
    for world_size in (1, 64, 512):
        some = loader(SequentialSampler(1, 1), 32, world_size)
        num_steps = ingest.max_steps_per_dataset(some)
        assert num_steps // plan_steps_per_task(some, num_steps) * world_size == ingest.MAX_TASKS_PER_DATASET
    assert ingest.max_steps_per_dataset(loader(SequentialSampler(1, 1), 2048, 100_000)) == 1


@pytest.fixture
def connected(ray_server: RayHead, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_ADDRESS", ray_server.address)
    monkeypatch.setenv("HOME", str(ray_server.home))
    with ray_session():
        yield


def stream_to_workers(sampler: EpochSampler, images: pa.Table, world_size: int, first: int, num: int) -> list[Any]:
    num_rows = -(-sampler.global_batch_size // world_size)
    local_loader = loader(sampler, num_rows, world_size)
    split = split_among_workers(local_loader, ray.put(images), first, num, sampler.steps_per_epoch, 0.5)

    def consume(rank: int) -> list[tuple[int, int, list[int]]]:
        local_batches = iterate_local_batches(split[rank], num_rows, rank, first, sampler.steps_per_epoch)
        return [(int(batch["epoch"][0]), int(batch["step"][0]), batch["id"].tolist()) for batch in local_batches]

    with ThreadPoolExecutor(world_size) as workers:
        return list(workers.map(consume, range(world_size)))


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("min_tasks", [16, 3])  # one step in a task, and two or more
def test_ray_streams_every_worker_its_local_batch_of_every_step(
    images: pa.Table, min_tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "MIN_TASKS_PER_WORKER", min_tasks)
    sampler = EpochSampler(num_images=24, global_batch_size=6, seed=1)  # 4 steps per epoch
    whole = stream_to_workers(sampler, images, world_size=2, first=0, num=8)
    for rank in range(2):
        assert [(epoch, step) for epoch, step, _ in whole[rank]] == [divmod(step, 4) for step in range(8)]
        for epoch, step, ids in whole[rank]:
            assert ids == sampler.local_batch(epoch, step, rank, 2).tolist()
    # The global batches are the same from the middle of an epoch, with one more worker.
    rest = stream_to_workers(sampler, images, world_size=3, first=6, num=2)
    for position, (epoch, step) in enumerate([(1, 2), (1, 3)]):
        ids = [index for rank in range(3) for index in rest[rank][position][2]]
        assert ids == sampler.batch(epoch, step).tolist()
