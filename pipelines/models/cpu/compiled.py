"""Exported programs, compiled ahead of time for the CPUs of this machine, once for all its processes and runs."""

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
"""Batch x H x W x 3, uint8, to logits and features."""


def compile_program(program: bytes, shape: tuple[int, ...], num_threads: int) -> Forward:
    """A forward pass of one shape. Calls wait for each other: the compiled code holds Python's lock.

    Args:
        program: of `torch.export.save`.
        shape: of the images, batch x H x W x 3.
        num_threads: that share a batch.

    Raises:
        RunError: this machine cannot do it.
    """
    if reason := why_no_int8():
        raise RunError(f"a node cannot run the model in int8: {reason}")
    about = (program, shape, num_threads, torch.__version__, sorted(cpu_flags()))
    key = hashlib.sha256(b"|".join(part if isinstance(part, bytes) else repr(part).encode() for part in about))
    path = cached(f"{key.hexdigest()}.pt2", lambda path: _compile_to(path, program, shape, num_threads))
    # What `torch._inductor.aoti_load_package` calls, after importing the compiler: 1.5 s of a core in each replica.
    loader = AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = loader.run([images])
        return logits, features

    return forward


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keep from the user what torch's exporter and compiler say to each other's developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compile_to(path: Path, program: bytes, shape: tuple[int, ...], num_threads: int) -> None:
    images = torch.zeros(shape, dtype=torch.uint8)
    use_private_compiler_cache()
    with torch.no_grad(), quiet_compiler():
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401 - registers the operators

        module: Any = torch.export.load(io.BytesIO(program)).module()  # the driver's own, through Ray's object store
        exported = torch.export.export(module, (images,))
        # Freezing packs the weights for the kernels.
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs={"freezing": True, "cpp.threads": num_threads}
        )
