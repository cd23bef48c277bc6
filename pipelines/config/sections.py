"""Sections that several jobs share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipelines.config.base import Section
from pipelines.config.uri import check_uri

# Larger than any photograph.
MAX_BYTES = 256 * 1024**2
# Above this, Pillow refuses to open an image: twice its warning limit, which is a quarter GiB of RGB.
PILLOW_MAX_PIXELS = 178_956_970

Uri = Annotated[str, Field(min_length=1), AfterValidator(check_uri)]
"""A URI without secrets, `~` expanded."""


def _one_or_two(value: object) -> object:
    # The command line passes every value of a field that may be a range as a list.
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _at_least_one_worker(value: int | tuple[int, int]) -> int | tuple[int, int]:
    least, most = (value, value) if isinstance(value, int) else value
    if not 1 <= least <= most:
        raise ValueError("a number from 1, or the minimum and maximum number of workers")
    return value


def _only_custom_resources(value: dict[str, float]) -> dict[str, float]:
    if said := value.keys() & {"CPU", "GPU"}:
        raise ValueError(f"{min(said)} has a key of its own: num_cpus_per_worker or use_gpu")
    return value


CustomResources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_only_custom_resources)]
"""Amounts of Ray's custom resources, by name."""

WorkerRange = Annotated[int | tuple[int, int], BeforeValidator(_one_or_two), AfterValidator(_at_least_one_worker)]
"""Number of workers, or its minimum and maximum."""


class InputConfig(Section):
    """Images to read."""

    uri: Uri
    """Folder or prefix that holds the images, or one image: a local path, `s3://bucket/prefix`, or what fsspec
    supports. Every object under it is an input, whatever its name. A `.csv`, `.tsv`, `.jsonl` or `.parquet` file is a
    list with a column `uri`."""

    exclude: list[str] = []
    """Shell patterns (`*.json`, `thumbs/*`), matched against the path below `input.uri`. Objects that match are not
    inputs; the summary counts them in `num_excluded`. On the command line, repeat the flag for each pattern."""

    max_bytes: int = Field(default=MAX_BYTES, gt=0)
    """Largest object fetched, in bytes. A larger one becomes a failed row (`too_many_bytes`)."""

    trust_list: bool = False
    """Allow a list that lies elsewhere to name files of this machine and hosts of its private network. A list on this
    machine may always name them."""


class LabelledInputConfig(Section):
    """Set of labelled images."""

    uri: Uri
    """Folder or prefix whose folders are named for the classes (`cat/1.jpg`), or a `.csv`, `.tsv`, `.jsonl` or
    `.parquet` list with columns `uri` and `label`: a local path, `s3://bucket/prefix`, or what fsspec supports. Hidden
    and system files and folders (`.ipynb_checkpoints`, `__MACOSX`, `Thumbs.db`) are skipped."""

    exclude: list[str] = []
    """Shell patterns (`*.txt`, `thumbs/*`), matched against the path below `uri`. Objects that match are skipped. On
    the command line, repeat the flag for each pattern."""

    trust_list: bool = False
    """Allow a list that lies elsewhere to name files of this machine and hosts of its private network. A list on this
    machine may always name them."""


class OutputConfig(Section):
    """Output of the job."""

    uri: Uri
    """Folder or prefix for the output: a local path, `s3://bucket/prefix`, or what fsspec supports. On a cluster of
    several nodes, a local path has to be one that all nodes share."""

    commit_rows: int = Field(default=2048, ge=1)
    """Maximum number of rows per Parquet file, and so the number of images that a kill may cost for each write in
    flight. Small runs write smaller files, so that results appear while the run is under way."""


class QuantizationConfig(Section):
    """Quantization and its quality check for `model.dtype=int8`, on images of the input."""

    num_images: int = Field(default=256, ge=1)
    """Images sampled, evenly over the input; all of them if there are fewer. One half sets the ranges of the
    activations, the other half compares int8 with float32."""

    min_agreement: float = Field(default=0.99, ge=0, le=1)
    """Fraction of the second half on which int8 has to have the same top-1 class as float32. Below it, the job is
    refused."""


class ModelConfig(Section):
    """Architecture and weights."""

    name: str = "ecaresnet50d"
    """Architecture, by its timm name, with or without a tag (`ecaresnet50d`, `ecaresnet50t.a1_in1k`). If not set and
    `model.weights` names a directory, the architecture in its config.json."""

    weights: Uri = "pretrained"
    """`pretrained` (timm's weights from the hub); a path or URI of a `.safetensors`, `.pth` or `.pth.tar` file or of a
    directory written by train or export; or `random` (seeded, for trials)."""

    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Precision of the forward pass. Embeddings and probabilities are always written as float32. `int8` is for CPUs
    with VNNI: the model is quantized on images of the input, and compiled once on each machine."""

    compile: bool = False
    """Compile the forward pass with `torch.compile` in replicas on GPUs. Each replica then takes about a minute to
    start, which long runs win back. Results differ in the last bits, so this is part of the fingerprint."""

    quantization: QuantizationConfig = QuantizationConfig()


class OutputsConfig(Section):
    """Columns written for each image."""

    topk: int = Field(default=5, ge=0)
    """Number of classes written per image, most probable first; 0 writes none. If not set, a model with fewer classes
    writes all of them."""

    embedding: bool = True
    """Write the pooled features: `num_features` float32 values per image."""


class PreprocessConfig(Section):
    """From encoded bytes to the model's input."""

    mode: Literal["exact", "fast", "cuda"] = "exact"
    """`exact` gives timm's eval transform bit for bit. `fast` decodes and resizes JPEGs in a fraction of the time, to
    pixels that differ slightly (BENCHMARKS.md says by how much). `cuda` decodes and resizes JPEGs of up to 16,777,216
    pixels and 512 KiB on the GPUs of the replicas; larger ones, other formats, and JPEGs that the GPU refuses are
    handled as in `fast`."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square input, in pixels. If not set, the model's own (224 for the five ECA ResNets)."""

    use_test_size: bool = False
    """Use the model's test size and crop (288 px and 0.95 for the five ECA ResNets) in place of its train size and crop
    (224 px and 0.875), which timm's `resolve_data_config` uses too."""

    max_pixels: int = Field(default=PILLOW_MAX_PIXELS, ge=1)
    """Largest source image decoded, as width times height. A larger one becomes a failed row (`too_many_pixels`).
    Decoding takes up to 25 bytes per pixel (JPEG 2000; 24 for WebP, 9 for most JPEGs). Images that take more than 64
    MiB wait for each other if together they would take more than a quarter of the memory of a node."""

    @property
    def max_pixels_on_device(self) -> int | None:
        """Largest image that a replica decodes, in pixels; None if replicas get decoded images."""
        return self.max_pixels if self.mode == "cuda" else None


class FailureConfig(Section):
    """Images that cannot be read."""

    max_fraction: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the images that may fail before the run stops and prints the most common reasons. Finished rows stay.
    Until 1,000 images are done, the fraction counts as one of 1,000."""

    retry: Literal["none", "transient", "all"] = "none"
    """Failed rows of an earlier run to retry: `transient` retries those with a storage error (`timeout`,
    `storage_error`), `all` every one. Rows that share a file with one of them are retried too."""


class ComputeConfig(Section):
    """Resources of the model replicas. Every default is planned from the resources of the cluster."""

    num_workers: WorkerRange | None = None
    """Number of model replicas (actors), or its minimum and maximum: all are requested at once, and the run starts with
    the minimum. If not set: one per GPU with `use_gpu`; else one for every 4 CPUs of a node (one per CPU with
    `model.dtype=int8`), as far as its memory holds them."""

    use_gpu: bool = False
    """Give each replica one GPU, as `use_gpu` of Ray's `ScalingConfig` does."""

    resources_per_worker: CustomResources = {}
    """Custom resources that Ray reserves for each replica, such as `{"NAME": 1}`. Replicas then run only on nodes that
    offer them; fetching, decoding and writing run on the other nodes, if there are any."""

    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that Ray reserves for each replica. If not set: 1 with a GPU; else the replicas share three quarters of the
    CPUs (half on nodes with fewer than 4 CPUs), so that fetching, decoding and writing continue."""

    num_threads_per_worker: int | None = Field(default=None, ge=1)
    """Batches that each replica on CPUs predicts at the same time, on one core each. If not set, its share of the CPUs
    of the node, as far as the memory holds the batches."""

    batch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass. Batches that are not full are padded. On CPUs it is rounded up to a multiple of 8, so
    that the result of an image does not depend on its position. If not set: 16 on CPUs, 256 on GPUs."""


def refuse_gpu_work_for_cpus(model: ModelConfig, preprocess: PreprocessConfig, compute: ComputeConfig) -> None:
    """Refuse what replicas on CPUs cannot do or do not gain from: compiled float32 convolutions also run in oneDNN."""
    if model.compile and (not compute.use_gpu or model.dtype == "int8"):
        raise ValueError("model.compile is for GPUs (compute.use_gpu); int8 is compiled anyway")
    if preprocess.mode == "cuda" and not compute.use_gpu:
        raise ValueError("preprocess.mode=cuda decodes on GPUs (compute.use_gpu); `fast` is the quick mode on CPUs")
