"""Ahead-of-time compilation of exported programs, cached for all processes and runs on a machine."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._aoti import AOTIModelPackageLoader

from pipelines.errors import RunError
from pipelines.runtime.cache import cached, use_private_compiler_cache
from pipelines.runtime.cpu import cpu_flags, why_no_int8

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Function from images (batch x H x W x 3, uint8) to logits and features."""


def compile_program(program: bytes, shape: tuple[int, ...], num_threads: int) -> Forward:
    """Compile the forward pass for one shape. Concurrent calls wait for each other, because the code holds the GIL.

    Args:
        program: Exported program in the format of `torch.export.save`.
        shape: Shape of the images, batch x H x W x 3.
        num_threads: Number of threads that share a batch.

    Raises:
        RunError: This machine cannot run int8.
    """
    if reason := why_no_int8():
        raise RunError(f"this node cannot run model.dtype = int8: {reason}")
    parts = (program, shape, num_threads, torch.__version__, sorted(cpu_flags()))
    key = hashlib.sha256(b"|".join(part if isinstance(part, bytes) else repr(part).encode() for part in parts))
    path = cached(f"{key.hexdigest()}.pt2", lambda path: _compile_to(path, program, shape, num_threads))
    # `torch._inductor.aoti_load_package` calls the same loader, but imports the compiler first, which takes 1.5 s of a
    # core in each replica.
    loader = AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = loader.run([images])
        return logits, features

    return forward


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Silence the warnings of torch's exporter and compiler, which mean nothing to users."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)


def _compile_to(path: Path, program: bytes, shape: tuple[int, ...], num_threads: int) -> None:
    images = torch.zeros(shape, dtype=torch.uint8)
    use_private_compiler_cache()
    with torch.no_grad(), quiet_compiler():
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401 - registers the operators

        # The program comes from our own driver, through Ray's object store.
        module: Any = torch.export.load(io.BytesIO(program)).module()
        exported = torch.export.export(module, (images,))
        # Freezing packs the weights into the layout of the kernels.
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs={"freezing": True, "cpp.threads": num_threads}
        )
