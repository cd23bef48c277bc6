"""Config of `jobs.train`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Section
from pipelines.config.sections import (
    MAX_BYTES,
    PILLOW_MAX_PIXELS,
    CustomResources,
    LabelledInputConfig,
    Uri,
    WorkerRange,
)

# Defaults of timm's `--lr-base` and `--lr-base-size`.
LR_BASE, LR_BASE_SIZE = 0.1, 256


class DataConfig(Section):
    """Training and validation images."""

    train: LabelledInputConfig
    validation: LabelledInputConfig | None = None
    """Labelled images to validate on after each epoch. Without them, the last checkpoint counts as the best."""

    max_bytes: int = Field(default=MAX_BYTES, gt=0)
    """Largest object fetched, in bytes. A larger one counts as failed."""


class TrainOutputConfig(Section):
    """Output of the training."""

    uri: Uri
    """Folder or prefix for checkpoints, metrics and curves: a local path or `s3://bucket/prefix`. The same command with
    the same output continues from its last checkpoint. On a cluster of several nodes, a local path has to be one that
    all nodes share."""


class TrainModelConfig(Section):
    """Architecture and initial weights."""

    name: str = "ecaresnet50d"
    """Architecture, by its timm name, with or without a tag. If not set and `model.weights` names a directory, the
    architecture in its config.json."""

    weights: Uri = "pretrained"
    """`pretrained` (timm's weights from the hub); a path or URI of a `.safetensors`, `.pth` or `.pth.tar` file or of a
    directory written by train or export; or `random` (seeded by `optim.seed`). The classifier is kept if its classes
    are those of the images: by name, or in timm's order of folders if the weights name no classes and have as many.
    Otherwise a new one is created."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward and backward passes (autocast; float16 scales the gradients). On GPUs, convolutions in
    float32 use TF32, as torch does."""

    compile: bool = False
    """Compile the model with `torch.compile`."""

    drop_rate: float | None = Field(default=None, ge=0, lt=1)
    """Dropout before the classifier. If not set, the architecture's own default (0 for most)."""

    drop_path_rate: float | None = Field(default=None, ge=0, lt=1)
    """Stochastic depth. If not set, the architecture's own default (0 for ResNets)."""

    freeze_backbone: bool = False
    """Train the classifier only. Batch norm layers keep their statistics."""

    freeze_batch_norm: bool = False
    """Freeze the statistics and the affine parameters of all batch norm layers."""

    sync_batch_norm: bool = False
    """Compute batch norm statistics over all workers. GPUs only."""


class TrainPreprocessConfig(Section):
    """From encoded bytes to the model's input."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input, in pixels. If not set, the model's own (224 for the five ECA ResNets)."""

    max_pixels: int = Field(default=PILLOW_MAX_PIXELS, ge=1)
    """Largest source image decoded, as width times height. A larger one counts as failed."""


class AugmentConfig(Section):
    """Random augmentation of the training images, under the names that timm uses."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the area of the random crop, as a fraction of the image."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect ratio (width over height) of the random crop."""

    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""

    vflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a vertical flip."""

    color_jitter: float = Field(default=0.4, ge=0)
    """Strength of random changes of brightness, contrast and saturation. Ignored if `auto_augment` is set."""

    auto_augment: str | None = None
    """timm policy string for RandAugment, AutoAugment or AugMix, such as `rand-m7-mstd0.5-inc1`."""

    random_erase_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability of filling a random rectangle with noise."""

    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup; 0 turns it off."""

    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of CutMix; 0 turns it off."""

    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    """Resize filter of the random crop; `random` picks bilinear or bicubic for each image."""

    @field_validator("scale", "ratio")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("a range has two numbers above 0, the smaller one first")
        return value

    @field_validator("scale")
    @classmethod
    def _is_within_the_image(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("a crop's area is a share of the image, at most 1")
        return value


def scales_lr_by_root(opt: str) -> bool:
    """Return whether timm scales the default rate of an optimizer with the square root of the batch size."""
    return any(name in opt.lower() for name in ("ada", "lamb"))


def _default_lr(validated: dict[str, Any]) -> float:
    """Return the learning rate that timm's `train.py` uses if none is given."""
    ratio = validated["global_batch_size"] / LR_BASE_SIZE
    return float(LR_BASE * (ratio**0.5 if scales_lr_by_root(validated["opt"]) else ratio))


class OptimConfig(Section):
    """Optimizer, learning-rate schedule and length of the training, under the names that timm uses."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""

    global_batch_size: int = Field(default=256, ge=1)
    """Images per optimizer step, over all workers and accumulated gradients. It does not change with the number of
    workers, nor do the learning rate and the number of steps."""

    grad_accum_steps: int = Field(default=1, ge=1)
    """Microbatches that each worker splits its local batch into, to save memory."""

    opt: str = "sgd"
    """Optimizer, by its timm name (`sgd`, `adamw`, `lamb`, ...). `sgd` uses Nesterov momentum."""

    lr: float = Field(default_factory=_default_lr, gt=0)
    """Learning rate for the global batch. If not set: 0.1 x `global_batch_size` / 256, or 0.1 x the square root of that
    ratio for optimizers whose name contains `ada` or `lamb` (`lr_base` and `lr_base_scale` in timm)."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the optimizer."""

    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay. Biases and normalization layers are exempt."""

    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor on the learning rate from each layer to the layer before it."""

    sched: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = "cosine"
    """Learning-rate schedule, updated at every step."""

    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs of linear warm-up."""

    warmup_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the start of the warm-up."""

    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the schedule."""

    decay_epochs: float = Field(default=30, gt=0)
    """Epochs between two decays of the `step` schedule."""

    decay_rate: float = Field(default=0.1, gt=0)
    """Factor of each decay of `step` and `multistep`; exponent of `poly`."""

    decay_milestones: list[int] = []
    """Epochs at which `multistep` decays."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the target that is spread over all classes."""

    bce_loss: bool = False
    """Use binary cross-entropy for each class in place of softmax cross-entropy."""

    clip_grad: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient. If not set, gradients are not clipped."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average (EMA) of the weights, which is validated beside the model. The checkpoint
    for use holds whichever scores better on the validation images. Without validation images it holds the EMA if that
    averages over at most a fifth of the steps, else the model. If not set, no EMA is kept."""

    ema_warmup: bool = True
    """Increase the EMA decay with the number of steps, up to `ema_decay`, with the formula that timm uses. Without it,
    the EMA of a short run consists of early weights."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""

    @model_validator(mode="after")
    def _schedule_makes_sense(self) -> "OptimConfig":
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} is longer than the training, epochs = {self.epochs}"
            )
        if self.warmup_epochs and self.warmup_lr > self.lr:
            raise ValueError(f"warmup_lr = {self.warmup_lr:g} is above the rate after the warm-up, lr = {self.lr:g}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above the rate at the start, lr = {self.lr:g}")
        if self.sched == "multistep" and not self.decay_milestones:
            raise ValueError("sched = multistep needs decay_milestones")
        if self.decay_milestones != sorted(set(self.decay_milestones)) or min(self.decay_milestones, default=1) < 1:
            raise ValueError(f"decay_milestones = {self.decay_milestones} are epochs from 1, in ascending order")
        return self


class ScalingConfig(Section):
    """Training workers and their resources, under the names of Ray Train's `ScalingConfig`."""

    num_workers: WorkerRange = 1
    """Number of training workers, or the minimum and maximum between which Ray resizes the run."""

    use_gpu: bool = False
    """Give each worker one GPU."""

    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that Ray reserves for each worker, and its number of threads if it has no GPU. If not set: one CPU with a
    GPU; else the workers share half of the CPUs, so that fetching and decoding continue, and all cores as threads."""

    resources_per_worker: CustomResources = {}
    """Custom resources that Ray reserves for each worker, such as `{"NAME": 1}`."""

    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Placement of the workers on the nodes."""

    accelerator_type: str | None = None
    """Type of GPU that the nodes must have, by Ray's name. If not set, any type will do."""

    label_selector: dict[str, str] | None = None
    """Ray node labels that the nodes of the workers must have. If not set, any node will do."""

    elastic_resize_monitor_interval_s: float = Field(default=60.0, ge=0)
    """Seconds between checks for whether more workers fit, if `num_workers` is a range."""


class CheckpointConfig(Section):
    """Checkpoints within an epoch."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints within an epoch. If not set, only the end of each epoch is a checkpoint."""


class FailureConfig(Section):
    """Limits on failures."""

    max_failures: int = Field(default=3, ge=-1)
    """Restarts from the last checkpoint after workers or the store were lost; -1 for no limit. Errors in code end the
    run at once, because a restart would meet them again."""

    max_fraction: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the training images that may fail in an epoch, and of the validation images that may fail in a
    validation, before the run stops."""


class LoggingConfig(Section):
    """Progress messages."""

    every_s: float = Field(default=5.0, gt=0)
    """Seconds between two progress lines."""


class TrainConfig(Section):
    """Train or fine-tune a classifier."""

    data: DataConfig
    output: TrainOutputConfig
    model: TrainModelConfig = TrainModelConfig()
    preprocess: TrainPreprocessConfig = TrainPreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failure: FailureConfig = FailureConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _sync_batch_norm_needs_gpus(self) -> "TrainConfig":
        if self.model.sync_batch_norm and not self.scaling.use_gpu:
            raise ValueError("model.sync_batch_norm needs scaling.use_gpu: torch synchronizes batch norm on GPUs only")
        return self

    @model_validator(mode="after")
    def _batch_divides_among_workers(self) -> "TrainConfig":
        workers, batch = self.scaling.num_workers, self.optim.global_batch_size
        if isinstance(workers, int) and batch % (workers * self.optim.grad_accum_steps):
            raise ValueError(
                f"optim.global_batch_size = {batch} is no multiple of scaling.num_workers = {workers} times "
                f"optim.grad_accum_steps = {self.optim.grad_accum_steps}"
            )
        return self
