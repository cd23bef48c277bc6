"""The shares of one worker: those of the training steps, and those of the validation set."""

from collections.abc import Iterator
from typing import Any

import ray
from numpy.typing import NDArray
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero

from pipelines.images.transform import EvalTransform
from pipelines.training.augment import EvalPixels, Pixels, TrainPixels
from pipelines.training.batches import LocalBatchLoader, Order, SequentialSampler
from pipelines.training.ingest import iterate_local_batches, split_among_workers
from pipelines.training.job import ImageSet, TrainJob


class LocalBatches:
    """Hands a worker its shares. All workers ask for the same ones, at the same time."""

    def __init__(self, job: TrainJob, transform: EvalTransform, rank: int, world_size: int) -> None:
        self._job, self._transform = job, transform
        self._rank, self._world_size = rank, world_size
        # As many images in a share of the validation as in one of the training: what fits there in memory fits here.
        self._num_rows = -(-job.config.optim.global_batch_size // world_size)
        self._held: list[Any] = []
        self._validation: list[DataIterator] | None = None

    def training(self, first_step: int, num_steps: int) -> Iterator[dict[str, NDArray[Any]]]:
        """The shares of some steps, counted over all epochs."""
        config, order = self._job.config, self._job.order
        pixels = TrainPixels(self._transform.input_size, self._transform.mean, config.augment, config.optim.seed)
        loader = self._loader(order, pixels, self._job.train)
        split = self._split(loader, self._job.train, first_step, num_steps, order.steps_per_epoch)
        return iterate_local_batches(split[self._rank], self._rank, first_step, order.steps_per_epoch)

    def validation(self, images: ImageSet) -> Iterator[dict[str, NDArray[Any]]]:
        """Shares that hold each image of the set once."""
        order = SequentialSampler(images.num_images, self._num_rows)
        num_steps = order.num_steps(self._world_size)
        if self._validation is None:
            pixels = EvalPixels(self._transform, self._job.config.preprocess.max_pixels)
            self._validation = self._split(self._loader(order, pixels, images), images, 0, num_steps, num_steps)
        return iterate_local_batches(self._validation[self._rank], self._rank, 0, num_steps)

    def _loader(self, order: Order, pixels: Pixels, images: ImageSet) -> LocalBatchLoader:
        config = self._job.config
        return LocalBatchLoader(
            order,
            self._num_rows,
            pixels,
            self._transform.input_size,
            self._world_size,
            config.data.max_bytes,
            config.preprocess.max_pixels,
            images.reader,
        )

    def _split(
        self, loader: LocalBatchLoader, images: ImageSet, first_step: int, num_steps: int, steps_per_epoch: int
    ) -> list[DataIterator]:
        """One iterator a worker, made by the first worker and known to all."""
        reference = None
        if self._rank == 0:
            split = split_among_workers(
                loader, images.images, first_step, num_steps, steps_per_epoch, self._job.num_cpus_per_task
            )
            reference = [ray.put(split)]
            self._held = reference  # alive for as long as the others may ask for it
        (found,) = broadcast_from_rank_zero(reference)
        iterators: list[DataIterator] = ray.get(found)
        return iterators
