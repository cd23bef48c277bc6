"""Options of the replicas. Importable without torch and Ray."""

from dataclasses import dataclass

from pipelines.outputs.columns import ModelColumns


@dataclass(frozen=True)
class PredictOptions:
    """Options of a replica.

    Attributes:
        batch_size: Number of images per forward pass. Smaller batches are padded to it.
        columns: Columns to compute for each image.
        use_gpu: True to run on the GPU that Ray assigned to this process, False to run on the CPU.
        num_threads: Number of CPU threads. Each computes its own batch; a quantized model uses all of them for one.
        compile: True to compile the model with `torch.compile` for the one shape that all batches have.
        max_pixels: Number of pixels of the largest image that a replica decodes; None if images arrive decoded.
    """

    batch_size: int
    columns: tuple[ModelColumns, ...]
    use_gpu: bool
    num_threads: int = 1
    compile: bool = False
    max_pixels: int | None = None
