"""Interface of an accelerator, with the implementation for CPUs: everything runs synchronously, in host memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray


class SideStream:
    """Stream for work that overlaps with the computation on the device.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work` on the stream. The current stream waits for the result; the host does not."""
        return work()

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of the tensor on the device."""
        return tensor.to(self.device)


class Download:
    """Results on their way to host memory.

    Args:
        tensors: Tensors on one device. The copies start when the tensors have been computed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]

    def wait(self) -> list[NDArray[Any]]:
        """Wait for the results, and return them. Other Python threads can run in the meantime."""
        return [copy.numpy() for copy in self._copies]


class Accelerator:
    """Device that a process computes on.

    To support another kind of accelerator, add a subclass in its own module, and a line in `choose_accelerator`.

    Attributes:
        device: torch device.
        runs_one_batch_at_a_time: True if the threads of a replica take turns, because one batch occupies the whole
            device.
    """

    runs_one_batch_at_a_time = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def side_stream(self) -> SideStream:
        """Return a new side stream."""
        return SideStream(self.device)

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Start copying tensors to host memory."""
        return Download(tensors)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""

    def synchronize_stream(self) -> None:
        """Wait until the device has finished the work of the current stream."""

    def used_bytes(self) -> int | None:
        """Return the device memory in use by all processes, in bytes; None if the device has no memory of its own."""
        return None

    def release_cached_memory(self) -> None:
        """Release the device memory that torch caches."""

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        """Return whether an error means that the device is out of memory."""
        return isinstance(error, torch.OutOfMemoryError)

    def retry_with_freed_memory(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work`. If the device is out of memory, release the cached memory and retry once."""
        try:
            return work()
        except RuntimeError as error:
            if not self.is_out_of_memory(error):
                raise
        self.release_cached_memory()  # after the except block: the error keeps the tensors in its stack frames alive
        return work()

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether the device supports a precision at a useful speed."""
        return True
