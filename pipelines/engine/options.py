"""Options of the replicas. Importable without torch and Ray."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictOptions:
    """Options of a replica.

    Attributes:
        batch_size: images per forward pass; fewer are padded to it.
        topk: classes kept per image; 0 for none.
        embedding: whether the pooled features are kept.
        use_gpu: run on the GPU that Ray gave this process, else on the CPU.
        num_threads: on the CPU; of one batch each, or all of one batch where the model is quantized.
        compile: whether `torch.compile` takes the model, for the one shape that all batches have.
        max_pixels: largest image that a replica decodes; None where images come decoded.
    """

    batch_size: int
    topk: int
    embedding: bool
    use_gpu: bool
    num_threads: int = 1
    compile: bool = False
    max_pixels: int | None = None
