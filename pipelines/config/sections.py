"""The sections that jobs share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from pipelines.config.base import Section
from pipelines.config.uri import check_uri

# Larger than any photograph; what is larger is no image, or not one to be read by the million.
MAX_BYTES = 256 * 1024**2
# Pillow's own limit, above which it refuses to open an image (twice its warning limit of a quarter GiB of RGB).
PILLOW_MAX_PIXELS = 178_956_970

Uri = Annotated[str, Field(min_length=1), AfterValidator(check_uri)]
"""A URI without secrets, `~` expanded."""


def _one_or_two(value: object) -> object:
    # The command line hands every value of a field that may be a range over as a list.
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _at_least_one_worker(value: int | tuple[int, int]) -> int | tuple[int, int]:
    least, most = (value, value) if isinstance(value, int) else value
    if not 1 <= least <= most:
        raise ValueError("a number from 1, or the least and the most of the workers")
    return value


WorkerRange = Annotated[int | tuple[int, int], BeforeValidator(_one_or_two), AfterValidator(_at_least_one_worker)]
"""A number of workers, or the least and the most of them."""


class InputConfig(Section):
    """The images to read."""

    uri: Uri
    """Folder or prefix that holds the images, or one image: a local path, `s3://bucket/prefix`, or what fsspec
    knows. Every object under it is an input, whatever its name. A `.csv`, `.tsv`, `.jsonl` or `.parquet` file is a list
    with the column `uri`."""

    exclude: list[str] = []
    """Shell patterns (`*.json`, `thumbs/*`), matched against the path below `input.uri`; what matches is not an
    input, and the summary counts it in `num_excluded`. On the command line each pattern has a flag of its own. Default:
    nothing is left out."""

    max_bytes: int = Field(default=MAX_BYTES, gt=0)
    """Largest object fetched, in bytes; a larger one becomes a failed row (`too_many_bytes`). Default: 256 MiB."""

    trust_list: bool = False
    """Allow a list that lies elsewhere to name files of this machine and addresses of its private network. A list on
    this machine may always name them. Default: false."""


class LabelledInputConfig(Section):
    """A set of labelled images."""

    uri: Uri
    """Folder or prefix whose folders are named for the classes (`cat/1.jpg`), or a `.csv`, `.tsv`, `.jsonl` or
    `.parquet` list with the columns `uri` and `label`: a local path, `s3://bucket/prefix`, or what fsspec knows. Hidden
    and system files and folders (`.ipynb_checkpoints`, `__MACOSX`, `Thumbs.db`) are left out."""

    exclude: list[str] = []
    """Shell patterns (`*.txt`, `thumbs/*`), matched against the path below `uri`; what matches is no image of the set.
    On the command line each pattern has a flag of its own. Default: nothing more is left out."""

    trust_list: bool = False
    """Allow a list that lies elsewhere to name files of this machine and addresses of its private network. A list on
    this machine may always name them. Default: false."""


class OutputConfig(Section):
    """Where the result goes."""

    uri: Uri
    """Folder or prefix for the result: a local path, `s3://bucket/prefix`, or what fsspec knows. On a cluster of
    several nodes a local path has to be one that all nodes share."""

    commit_rows: int = Field(default=2048, ge=1)
    """Rows per Parquet file at most, and so the images that a kill may cost for each write in flight. Small runs
    write smaller files, so that results appear while the run goes on. Default: 2,048."""


class QuantizationConfig(Section):
    """How `model.dtype=int8` is made and judged, on images of the input."""

    num_images: int = Field(default=256, ge=1)
    """Images sampled, evenly over the input. One half sets the ranges of the activations, the other compares int8 with
    float32. Default: 256, or as many as there are."""

    min_agreement: float = Field(default=0.99, ge=0, le=1)
    """Share of the second half whose top-1 has to be that of float32; below it the job is refused. Default: 0.99."""


class ModelConfig(Section):
    """The network and its weights."""

    name: str = "ecaresnet50d"
    """timm's name of the architecture, with or without a tag (`ecaresnet50d`, `ecaresnet50t.a1_in1k`). Default:
    ecaresnet50d, or, where `model.weights` names a directory, the architecture that its config.json names."""

    weights: Uri = "pretrained"
    """`pretrained` (timm's hub weights, the default); a path or URI of a `.safetensors`, `.pth` or `.pth.tar` file
    or of a directory written by train or export; or `random` (seeded, for trials)."""

    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Precision of the forward pass; embeddings and probabilities are written as float32 whatever it is. `int8` is for
    CPUs with VNNI: it is quantized on images of the input, and compiled once on each machine. Default: float32."""

    compile: bool = False
    """Whether replicas on GPUs compile the forward pass (`torch.compile`): about a minute each at their start, which
    long runs win back. Values differ in the last bits, so it is part of the fingerprint. Default: false."""

    quantization: QuantizationConfig = QuantizationConfig()


class OutputsConfig(Section):
    """What is written for each image."""

    topk: int = Field(default=5, ge=0)
    """Number of classes written per image, most probable first; 0 writes none. Default: 5, or all classes where
    the model has fewer."""

    embedding: bool = True
    """Whether the pooled features are written, `num_features` float32 values per image. Default: true."""


class PreprocessConfig(Section):
    """From bytes to the model's input."""

    mode: Literal["exact", "fast", "cuda"] = "exact"
    """`exact` (the default) gives timm's eval transform bit for bit. `fast` decodes and resizes JPEG in a fraction of
    the time, to pixels that differ a little (see BENCHMARKS.md for how much). `cuda` has replicas on GPUs decode and
    resize JPEGs of up to 16,777,216 pixels and 512 KiB there; larger ones, other files, and what a GPU refuses, are
    done as `fast` does it."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input, in pixels. Default: the model's own (224 for the five ECA ResNets)."""

    use_test_size: bool = False
    """Take the model's test size and crop (288 px and 0.95 for the five) in place of the train size and crop (224 px
    and 0.875). Default: false, as timm's `resolve_data_config`."""

    max_pixels: int = Field(default=PILLOW_MAX_PIXELS, ge=1)
    """Largest source image decoded, width times height; a larger one becomes a failed row (`too_many_pixels`).
    Decoding takes up to 25 bytes per pixel (JPEG 2000; 24 for WebP, 9 for most JPEGs). Images of more than 64 MiB wait
    for each other where those of a node would take more than a quarter of its memory. Default: Pillow's own limit,
    178,956,970."""

    @property
    def max_pixels_on_device(self) -> int | None:
        """Largest image that a replica decodes, in pixels; None where images come to it decoded."""
        return self.max_pixels if self.mode == "cuda" else None


class FailureConfig(Section):
    """Images that cannot be had."""

    max_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the images that may fail before the run stops, with the commonest reasons; what is done stays. The
    first 1,000 images count as 1,000 from the first on. Default: 0.05."""

    retry: Literal["none", "transient", "all"] = "none"
    """Which failed rows of an earlier run are done anew: `transient` those whose store failed (`timeout`,
    `storage_error`), `all` every one. Rows that share a file with one of them are done anew too. Default: none."""


class ComputeConfig(Section):
    """The machines' share. Every default is planned from what the cluster has."""

    num_workers: WorkerRange | None = None
    """Model replicas (actors), or the least and the most of them: all are asked for at once, and the run begins with
    the least. Default: one for each GPU with `use_gpu`, else one for every 4 CPUs of a node (for every CPU with
    `model.dtype=int8`), where its memory holds them."""

    use_gpu: bool = False
    """Whether each replica takes a GPU of the cluster, as Ray's `ScalingConfig.use_gpu`. Default: false."""

    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Custom resources that Ray sets aside for each replica, such as `{"inferentia": 1}`: replicas run only on nodes
    that offer them, and fetching, decoding and writing on the others, where there are any. Default: none."""

    @field_validator("resources_per_worker")
    @classmethod
    def _only_custom_resources(cls, value: dict[str, float]) -> dict[str, float]:
        if said := value.keys() & {"CPU", "GPU"}:
            raise ValueError(f"{min(said)} has a key of its own: num_cpus_per_worker or use_gpu")
        return value

    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that Ray sets aside for each replica. Default: 1 with a GPU; else three quarters of the CPUs shared among
    the replicas (half of them on nodes of fewer than 4 CPUs), so that fetching, decoding and writing go on."""

    num_threads_per_worker: int | None = Field(default=None, ge=1)
    """Batches that each replica on CPUs predicts at the same time, a core each. Default: the node's CPUs shared among
    its replicas, where its memory holds the batches."""

    batch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass; batches that are not full are padded to it. On CPUs it is rounded up to a multiple of 8,
    so that each image's result is the same wherever it stands. Default: 16 on CPUs, 256 on GPUs."""


def refuse_gpu_work_for_cpus(model: ModelConfig, preprocess: PreprocessConfig, compute: ComputeConfig) -> None:
    """Refuse what replicas on CPUs can't do, or would only pay for: a compiled float32 convolution is oneDNN's too."""
    if model.compile and (not compute.use_gpu or model.dtype == "int8"):
        raise ValueError("model.compile is for GPUs (compute.use_gpu); int8 is compiled anyway")
    if preprocess.mode == "cuda" and not compute.use_gpu:
        raise ValueError("preprocess.mode=cuda decodes on GPUs (compute.use_gpu); `fast` is the quick way on CPUs")
