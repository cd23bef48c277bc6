"""Convolutions of 3 x 3 on CPUs by Winograd's filtering, in code that each machine compiles for itself, once."""

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
# Not `-ffast-math`: what is no number stays none, and the order of sums is the source's.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
NEEDED_CPU_FLAGS = {"avx2", "fma"}
# Below, the transforms cost more than the products save.
MIN_CHANNELS = 16
# Of a filter, at the points of `winograd.cpp`: 0, 1, -1, 1/2, -2 and infinity.
AT_POINTS = torch.tensor(
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
    """A convolution of 3 x 3 with a quarter of its multiplications, and the ReLU that follows it.

    The result is that of `nn.Conv2d` but for rounding: of layers with few channels more, with many less than torch's,
    over a whole model about as much. On the thread that calls; other threads of Python go on.

    Args:
        convolution: one that `can_filter` takes, of finite weights.
        has_relu: whether a ReLU follows.
        library: of `load_library`.
    """

    def __init__(self, convolution: nn.Conv2d, has_relu: bool, library: ctypes.CDLL) -> None:
        super().__init__()
        self.has_relu = has_relu
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self._library = library
        bias = convolution.bias
        self.bias = torch.zeros(self.out_channels) if bias is None else bias.detach()
        self._packed = torch.empty(library.winograd_packed_size(self.in_channels, self.out_channels))
        weights = _at_points(convolution.weight.detach())
        library.winograd_pack(weights.data_ptr(), self.in_channels, self.out_channels, self._packed.data_ptr())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Batch x channels x height x width, float32, as `nn.Conv2d`."""
        if images.dtype != torch.float32 or images.shape[1] != self.in_channels:
            raise RuntimeError(
                f"{self.in_channels} channels of float32 expected, not {images.shape[1]} of {images.dtype}"
            )
        images = images.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = images.shape
        output = torch.empty(
            (batch, self.out_channels, height, width), dtype=torch.float32, memory_format=torch.channels_last
        )
        tensors = (tensor.data_ptr() for tensor in (images, self._packed, self.bias, output))
        sizes = (batch, height, width, self.in_channels, self.out_channels, self.has_relu)
        if self._library.winograd_convolve(*tensors, *sizes) != 0:
            raise MemoryError("no memory is left for a convolution")
        return output


def can_filter(convolution: nn.Conv2d) -> bool:
    """Whether the method takes this layer, and is faster."""
    how = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return (
        how == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and min(convolution.in_channels, convolution.out_channels) >= MIN_CHANNELS
        and convolution.weight.dtype == torch.float32
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """`winograd.cpp`, compiled for this machine; None where its CPU forbids that, or, as is then said, its compiler."""
    if not cpu_flags() >= NEEDED_CPU_FLAGS:
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:  # RuntimeError: of a user without a home
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
        log.warning("convolutions of 3 x 3 take twice as long as they could: %s", said or error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    library.winograd_packed_size.argtypes = [size, size]
    library.winograd_packed_size.restype = size
    library.winograd_pack.argtypes = [pointer, size, size, pointer]
    library.winograd_pack.restype = None
    library.winograd_convolve.argtypes = [*[pointer] * 4, *[size] * 5, ctypes.c_int]
    return library


def _compiled() -> Path:
    compiler = cxx()
    if not compiler:
        raise FileNotFoundError("there is no C++ compiler (g++)")
    about = (SOURCE.read_bytes(), compiler, FLAGS, sorted(cpu_flags()))
    key = hashlib.sha256(repr(about).encode()).hexdigest()
    return cached(f"{key}.so", lambda path: _compile_to(path, compiler))


def _compile_to(path: Path, compiler: str) -> None:
    subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(path)], check=True, capture_output=True, text=True)


def _at_points(weight: torch.Tensor) -> torch.Tensor:
    """Out x in x 3 x 3 to 36 x in x out, rounded once."""
    filters = weight.permute(2, 3, 1, 0).reshape(9, -1)
    transform = torch.kron(AT_POINTS, AT_POINTS)
    points = torch.empty(36, filters.shape[1])
    for start in range(0, filters.shape[1], 4096):  # the cache holds so many
        some = slice(start, start + 4096)
        points[:, some] = transform @ filters[:, some].double()
    return points
