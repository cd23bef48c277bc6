"""The request of `jobs.train`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Section
from pipelines.config.sections import (
    MAX_BYTES,
    PILLOW_MAX_PIXELS,
    LabelledInputConfig,
    Uri,
    WorkerRange,
)

# Defaults of timm's `--lr-base` and `--lr-base-size`.
LR_BASE, LR_BASE_SIZE = 0.1, 256


class DataConfig(Section):
    """The images to learn from and those to measure with."""

    train: LabelledInputConfig
    validation: LabelledInputConfig | None = None
    """Default: no validation; the last checkpoint is then the best."""

    max_bytes: int = Field(default=MAX_BYTES, gt=0)
    """Largest object fetched, in bytes; a larger one counts as failed. Default: 256 MiB."""


class TrainOutputConfig(Section):
    """Where the result goes."""

    uri: Uri
    """Folder or prefix for checkpoints, metrics and curves: a local path or `s3://bucket/prefix`. The same command on
    the same output goes on from its last checkpoint. On a cluster of several nodes a local path has to be one that all
    nodes share."""


class TrainModelConfig(Section):
    """The network and what it starts from."""

    name: str = "ecaresnet50d"
    """timm's name of the architecture, with or without a tag. Default: ecaresnet50d, or, where `model.weights` names a
    directory, the architecture that its config.json names."""

    weights: Uri = "pretrained"
    """`pretrained` (timm's hub weights, the default); a path or URI of a `.safetensors`, `.pth` or `.pth.tar` file or
    of a directory written by train or export; or `random` (by `optim.seed`). The classifier is kept where its classes
    are those of the images, by name, or in timm's order of folders where the weights name none and have as many; else
    it is made anew."""

    drop_rate: float | None = Field(default=None, ge=0, lt=1)
    """Dropout before the classifier. Default: the model's own, 0 for most."""

    drop_path_rate: float | None = Field(default=None, ge=0, lt=1)
    """Stochastic depth. Default: the model's own, 0 for ResNets."""

    freeze_backbone: bool = False
    """Train the classifier alone; batch norm then keeps its statistics. Default: false."""

    freeze_batch_norm: bool = False
    """Batch norm keeps its statistics and its scale. Default: false."""

    sync_batch_norm: bool = False
    """Batch statistics over all workers; on GPUs only. Default: false."""


class TrainPreprocessConfig(Section):
    """From bytes to the model's input."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input, in pixels. Default: the model's own (224 for the five ECA ResNets)."""

    max_pixels: int = Field(default=PILLOW_MAX_PIXELS, ge=1)
    """Largest source image decoded, width times height; a larger one counts as failed. Default: Pillow's own limit,
    178,956,970."""


class AugmentConfig(Section):
    """Random changes of the training images, by timm's names."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area, as a share of the image. Default: 0.08 to 1."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's width over height. Default: 3/4 to 4/3."""

    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip. Default: 0.5."""

    vflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a vertical flip. Default: 0."""

    color_jitter: float = Field(default=0.4, ge=0)
    """Random brightness, contrast and saturation, up to this factor; off with `auto_augment`. Default: 0.4."""

    auto_augment: str | None = None
    """timm's RandAugment, AutoAugment or AugMix string, such as `rand-m7-mstd0.5-inc1`. Default: none."""

    random_erase_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is filled with noise. Default: 0."""

    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup. Default: 0, off."""

    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of CutMix. Default: 0, off."""

    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    """Filter of the random crop's resize. Default: random, one of the two for each image."""

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
    """Tell whether timm scales an optimizer's default rate with the square root of the batch, not the batch."""
    return any(name in opt.lower() for name in ("ada", "lamb"))


def _default_lr(validated: dict[str, Any]) -> float:
    """Return the learning rate that timm's `train.py` takes where none is given."""
    ratio = validated["global_batch_size"] / LR_BASE_SIZE
    return float(LR_BASE * (ratio**0.5 if scales_lr_by_root(validated["opt"]) else ratio))


class OptimConfig(Section):
    """Optimizer, schedule and length of the training, by timm's names."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training images. Default: 100."""

    global_batch_size: int = Field(default=256, ge=1)
    """Images a step, over all workers and gradient accumulation. It stays what it is when the number of workers
    changes, and so do the rate and the number of steps. Default: 256."""

    grad_accum_steps: int = Field(default=1, ge=1)
    """Passes that each worker splits its share of a batch into, to save memory. Default: 1."""

    opt: str = "sgd"
    """Optimizer, by timm's name (`sgd`, `adamw`, `lamb`, ...). Default: sgd, with Nesterov's momentum."""

    lr: float = Field(default_factory=_default_lr, gt=0)
    """Learning rate for the whole global batch. Default: 0.1 times `global_batch_size` / 256, or times the square root
    of that for optimizers whose name holds `ada` or `lamb`: timm's `lr_base` and `lr_base_scale`."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Default: 0.9."""

    weight_decay: float = Field(default=1e-4, ge=0)
    """Not on biases and norms. Default: 1e-4."""

    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor on the rate from each layer to the one before it. Default: none."""

    sched: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = "cosine"
    """Schedule of the rate, updated at each step. Default: cosine."""

    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs of linear warm-up. Default: 0."""

    warmup_lr: float = Field(default=1e-5, ge=0)
    """Rate at the start of the warm-up. Default: 1e-5."""

    min_lr: float = Field(default=0.0, ge=0)
    """Rate at the end of the schedule. Default: 0."""

    decay_epochs: float = Field(default=30, gt=0)
    """Epochs between decays of `step`. Default: 30."""

    decay_rate: float = Field(default=0.1, gt=0)
    """Factor of each decay of `step` and `multistep`; of `poly` the exponent. Default: 0.1."""

    decay_milestones: list[int] = []
    """Epochs at which `multistep` decays. Default: none."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all classes. Default: 0."""

    bce_loss: bool = False
    """Binary cross-entropy, each class by itself, in place of softmax cross-entropy. Default: false."""

    clip_grad: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient. Default: none."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average (EMA) of the weights, which is then measured beside the model. Handed out
    is what scores better on the validation images; without these, the EMA if it averages over at most a fifth of the
    steps, else the model. Default: none."""

    ema_warmup: bool = True
    """Let the EMA's decay grow with the steps, up to `ema_decay`, by timm's formula: without it, an EMA of a short run
    consists of early weights. Default: true."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of forward and backward pass (autocast; float16 with a scaled gradient). On GPUs float32's convolutions
    take TF32, torch's default. Default: float32."""

    compile: bool = False
    """Whether the model is compiled by torch. Default: false."""

    seed: int = Field(default=0, ge=0)
    """Of everything random. Default: 0."""

    @model_validator(mode="after")
    def _schedule_makes_sense(self) -> "OptimConfig":
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} is longer than the training, epochs = {self.epochs}"
            )
        if self.warmup_epochs and self.warmup_lr > self.lr:
            raise ValueError(f"warmup_lr = {self.warmup_lr:g} is above the rate that it leads to, lr = {self.lr:g}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above the rate at the start, lr = {self.lr:g}")
        if self.sched == "multistep" and not self.decay_milestones:
            raise ValueError("sched = multistep decays at decay_milestones, and none are given")
        if self.decay_milestones != sorted(set(self.decay_milestones)) or min(self.decay_milestones, default=1) < 1:
            raise ValueError(f"decay_milestones = {self.decay_milestones} are epochs from 1, in ascending order")
        return self


class ScalingConfig(Section):
    """The workers, by the names of Ray Train's `ScalingConfig`."""

    num_workers: WorkerRange = 1
    """Training workers, or the least and the most of them, between which Ray resizes the run. Default: 1."""

    use_gpu: bool = False
    """Whether each worker takes a GPU. Default: false."""

    resources_per_worker: dict[str, float] | None = None
    """What Ray sets aside for each worker; on CPUs also its number of threads. Default: with a GPU, that and one CPU;
    else half of the CPUs shared among the workers, so that fetching and decoding go on, and all of the cores shared as
    threads."""

    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How the workers are placed on the nodes. Default: PACK."""

    accelerator_type: str | None = None
    """Type of GPU that the nodes must have, by Ray's name. Default: any."""

    label_selector: dict[str, str] | None = None
    """Labels that the workers' nodes must have, by Ray's names. Default: any node."""

    elastic_resize_monitor_interval_s: float = Field(default=60.0, ge=0)
    """Seconds between looks at whether more workers fit, where `num_workers` is a range. Default: 60."""


class CheckpointConfig(Section):
    """When the state is saved."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints within an epoch; each epoch's end is one too. Default: epochs' ends only."""


class FailureConfig(Section):
    """What a run survives."""

    max_failures: int = Field(default=3, ge=-1)
    """Restarts from the last checkpoint after workers or the store were lost; -1 for any number. An error of code ends
    the run at once, as a restart would meet it again. Default: 3."""

    max_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the training images that may fail in an epoch, and of the validation images that may fail in a
    validation, before the run stops. Default: 0.05."""


class LoggingConfig(Section):
    """What is said while it works."""

    every_s: float = Field(default=5.0, gt=0)
    """Seconds between lines of progress. Default: 5."""


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
            raise ValueError("model.sync_batch_norm needs scaling.use_gpu: torch has no synchronized norm on CPUs")
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
