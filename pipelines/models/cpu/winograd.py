"""3 x 3 convolutions on CPUs with Winograd's minimal filtering, in C++ that each machine compiles once."""

import ctypes
import functools
import hashlib
import logging
import subprocess
from pathlib import Path

import torch
from torch import nn

from pipelines.runtime.cache import cached
from pipelines.runtime.cpu import cpu_flags, cxx

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
# Without `-ffast-math`, so that NaN stays NaN and sums keep the order of the source.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
NEEDED_CPU_FLAGS = {"avx2", "fma"}
# With fewer channels, the transforms cost more than the products save.
MIN_CHANNELS = 16
# Filter transform for the points of `winograd.cpp`: 0, 1, -1, 1/2, -2 and infinity.
FILTER_TRANSFORM = torch.tensor(
    [
        [1, 0, 0],
        [1 / 3, 1 / 3, 1 / 3],
        [-1 / 3, 1 / 3, -1 / 3],
        [-16 / 15, -8 / 15, -4 / 15],
        [1 / 15, -2 / 15, 4 / 15],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)


class WinogradConv2d(nn.Module):
    """3 x 3 convolution with a quarter of the multiplications, fused with the ReLU that follows it.

    Results equal those of `nn.Conv2d` up to rounding. Compared with torch, the rounding error is larger for layers with
    few channels, smaller for layers with many, and about the same for a whole model. A call runs on the calling thread
    and releases the GIL.

    Args:
        convolution: Convolution that `is_supported` accepts, with finite weights.
        has_relu: True if a ReLU follows.
        library: Result of `load_library`.
    """

    def __init__(self, convolution: nn.Conv2d, has_relu: bool, library: ctypes.CDLL) -> None:
        super().__init__()
        self.has_relu = has_relu
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self._library = library
        bias = convolution.bias
        self.bias = torch.zeros(self.out_channels) if bias is None else bias.detach()
        self._packed = torch.empty(library.winograd_packed_size(self.in_channels, self.out_channels))
        weights = _transform_filters(convolution.weight.detach())
        library.winograd_pack(weights.data_ptr(), self.in_channels, self.out_channels, self._packed.data_ptr())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve float32 images, batch x channels x height x width, like `nn.Conv2d`."""
        if images.dtype != torch.float32 or images.shape[1] != self.in_channels:
            raise RuntimeError(
                f"expected {self.in_channels} channels of torch.float32, but got {images.shape[1]} of {images.dtype}"
            )
        images = images.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = images.shape
        output = torch.empty(
            (batch, self.out_channels, height, width), dtype=torch.float32, memory_format=torch.channels_last
        )
        tensors = (tensor.data_ptr() for tensor in (images, self._packed, self.bias, output))
        sizes = (batch, height, width, self.in_channels, self.out_channels, self.has_relu)
        if self._library.winograd_convolve(*tensors, *sizes) != 0:
            raise MemoryError("out of memory in a Winograd convolution")
        return output


def is_supported(convolution: nn.Conv2d) -> bool:
    """Return whether the method supports this layer, and is faster for it."""
    geometry = (
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )
    return (
        geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and min(convolution.in_channels, convolution.out_channels) >= MIN_CHANNELS
        and convolution.weight.dtype == torch.float32
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return the library compiled from `winograd.cpp` for this machine.

    Returns:
        The library, or None if the CPU does not support it, or it cannot be compiled. The latter is logged.
    """
    if not cpu_flags() >= NEEDED_CPU_FLAGS:
        return None
    try:
        library = ctypes.CDLL(str(_compile_cached()))
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        stderr = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
        log.warning(
            "cannot compile the Winograd convolutions, so 3 x 3 convolutions will take twice as long: %s",
            stderr or error,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    library.winograd_packed_size.argtypes = [size, size]
    library.winograd_packed_size.restype = size
    library.winograd_pack.argtypes = [pointer, size, size, pointer]
    library.winograd_pack.restype = None
    library.winograd_convolve.argtypes = [*[pointer] * 4, *[size] * 5, ctypes.c_int]
    return library


def _compile_cached() -> Path:
    compiler = cxx()
    if not compiler:
        raise FileNotFoundError("no C++ compiler found, install g++")
    parts = (SOURCE.read_bytes(), compiler, FLAGS, sorted(cpu_flags()))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return cached(f"{key}.so", lambda path: _compile_to(path, compiler))


def _compile_to(path: Path, compiler: str) -> None:
    subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(path)], check=True, capture_output=True, text=True)


def _transform_filters(weight: torch.Tensor) -> torch.Tensor:
    """Transform filters (out x in x 3 x 3) to 36 x (in * out), in float64 and rounded to float32 once."""
    filters = weight.permute(2, 3, 1, 0).reshape(9, -1)  # 3 x 3 x in x out
    transform = torch.kron(FILTER_TRANSFORM, FILTER_TRANSFORM)
    transformed = torch.empty(36, filters.shape[1])
    for start in range(0, filters.shape[1], 4096):  # a chunk fits in the CPU cache
        chunk = slice(start, start + 4096)
        transformed[:, chunk] = transform @ filters[:, chunk].double()
    return transformed
