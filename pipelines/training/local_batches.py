"""Local batches of one worker, for the training steps and for the validation set."""

from collections.abc import Iterator
from typing import Any

import ray
from numpy.typing import NDArray
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero

from pipelines.images.transform import EvalTransform
from pipelines.training.augment import EvalPixels, Pixels, TrainPixels
from pipelines.training.batches import LocalBatchLoader, Sampler, SequentialSampler
from pipelines.training.ingest import iterate_local_batches, max_steps_per_dataset, split_among_workers
from pipelines.training.job import ImageSet, TrainJob


class LocalBatches:
    """Source of a worker's local batches. Its methods are collective: all workers call them with the same arguments."""

    def __init__(self, job: TrainJob, transform: EvalTransform, rank: int, world_size: int) -> None:
        self._job, self._transform = job, transform
        self._rank, self._world_size = rank, world_size
        # Local batches of training and validation have the same size, so that validation needs no more memory.
        self._num_rows = -(-job.config.optim.global_batch_size // world_size)
        self._held: list[Any] = []
        self._validation: list[DataIterator] | None = None

    def training(self, first_step: int, num_steps: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the local batches of the next training steps, as many as fit into one dataset.

        Args:
            first_step: First step, counted from 0 over all epochs.
            num_steps: Largest number of steps.
        """
        config, sampler = self._job.config, self._job.sampler
        pixels = TrainPixels(self._transform.input_size, self._transform.mean, config.augment, config.optim.seed)
        loader = self._loader(sampler, pixels, self._job.train)
        num_steps = min(num_steps, max_steps_per_dataset(loader))
        split = self._split(loader, self._job.train, first_step, num_steps, sampler.steps_per_epoch)
        return iterate_local_batches(split[self._rank], self._num_rows, self._rank, first_step, sampler.steps_per_epoch)

    def validation(self, images: ImageSet) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield local batches that together hold each image of the set once."""
        sampler = SequentialSampler(images.num_images, self._num_rows)
        num_steps = sampler.num_steps(self._world_size)
        if self._validation is None:
            pixels = EvalPixels(self._transform, self._job.config.preprocess.max_pixels)
            self._validation = self._split(self._loader(sampler, pixels, images), images, 0, num_steps, num_steps)
        return iterate_local_batches(self._validation[self._rank], self._num_rows, self._rank, 0, num_steps)

    def _loader(self, sampler: Sampler, pixels: Pixels, images: ImageSet) -> LocalBatchLoader:
        config = self._job.config
        return LocalBatchLoader(
            sampler,
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
        """Create one iterator per worker on rank 0 and broadcast them. A collective operation."""
        reference = None
        if self._rank == 0:
            split = split_among_workers(
                loader, images.images, first_step, num_steps, steps_per_epoch, self._job.num_cpus_per_task
            )
            reference = [ray.put(split)]
            self._held = reference  # keeps the object alive until the other workers have fetched it
        (found,) = broadcast_from_rank_zero(reference)
        iterators: list[DataIterator] = ray.get(found)
        return iterators
