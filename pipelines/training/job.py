"""What the driver hands to each training worker, and the names that both use."""

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
    """A set of images in the object store.

    Attributes:
        images: a table of `uri`, the locators of the reader, and `target`; an image's id is its row.
        num_images: its rows.
        reader: reads the images.
    """

    images: "ray.ObjectRef[pa.Table]"
    num_images: int
    reader: Reader


@dataclass(frozen=True)
class TrainJob:
    """A request whose every question is answered.

    Attributes:
        config: with normalized URIs.
        start: a `StartingPoint` in the object store.
        train: the images to learn from.
        validation: those to measure with, if there are any.
        num_threads: of torch in each worker; None leaves it to torch.
        num_cpus_per_task: what Ray sets aside for each share in the making.
        fence: of the run's lease; None where no lease protects the output.
    """

    config: TrainConfig
    start: "ray.ObjectRef[StartingPoint]"
    train: ImageSet
    validation: ImageSet | None
    num_threads: int | None
    num_cpus_per_task: float
    fence: Fence | None = None

    @property
    def order(self) -> EpochSampler:
        """Which image is seen when."""
        optim = self.config.optim
        return EpochSampler(self.train.num_images, optim.global_batch_size, optim.seed)
