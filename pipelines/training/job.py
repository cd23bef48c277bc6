"""Data that the driver passes to each training worker."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import ray

from pipelines.config.train import TrainConfig
from pipelines.inputs.reader import Reader
from pipelines.outputs.lease import Fence
from pipelines.training.sampler import EpochSampler

if TYPE_CHECKING:
    from pipelines.training.start import StartingPoint


@dataclass(frozen=True)
class ImageSet:
    """Labelled images whose table is in the object store.

    Attributes:
        images: Table of `uri`, the reader's locator columns and `target`. The id of an image is its row.
        num_images: Number of rows of the table.
        reader: Reader of the images.
    """

    images: "ray.ObjectRef[pa.Table]"
    num_images: int
    reader: Reader


@dataclass(frozen=True)
class TrainJob:
    """Resolved request, as a worker receives it.

    Attributes:
        config: Config with normalized URIs.
        start: `StartingPoint` in the object store.
        train: Training images.
        validation: Validation images, if there are any.
        num_threads: Number of torch threads in each worker; None keeps torch's default.
        num_cpus_per_task: CPUs that Ray reserves for each task that loads local batches.
        fence: Fence of the run's lease; None if no lease protects the output.
    """

    config: TrainConfig
    start: "ray.ObjectRef[StartingPoint]"
    train: ImageSet
    validation: ImageSet | None
    num_threads: int | None
    num_cpus_per_task: float
    fence: Fence | None = None

    @property
    def sampler(self) -> EpochSampler:
        """Sampler of the training images."""
        optim = self.config.optim
        return EpochSampler(self.train.num_images, optim.global_batch_size, optim.seed)
