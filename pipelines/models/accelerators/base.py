"""Interface of an accelerator, as the CPU implements it: everything happens at once, in host memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray


class SideStream:
    """Stream for work that runs beside what the device is computing.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work` on the stream. The current stream waits for the result; the host does not."""
        return work()

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the device."""
        return tensor.to(self.device)


class Download:
    """Results on their way to host memory.

    Args:
        tensors: Tensors on one device. They are copied once they are computed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]

    def wait(self) -> list[NDArray[Any]]:
        """Wait for the results, and return them. Other threads hold Python's lock meanwhile."""
        return [copy.numpy() for copy in self._copies]


class Accelerator:
    """Device that a process computes on.

    Another kind of accelerator is a subclass in a module of its own, and a line in `choose_accelerator`.

    Attributes:
        device: torch device.
        runs_one_batch_at_a_time: Whether the threads of a replica take turns, because one batch occupies the whole
            device.
    """

    runs_one_batch_at_a_time = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def side_stream(self) -> SideStream:
        """Return a new stream beside the current one."""
        return SideStream(self.device)

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Start to copy tensors to host memory."""
        return Download(tensors)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""

    def used_bytes(self) -> int | None:
        """Return the memory of the device that is in use, by all processes; None if it has no memory of its own."""
        return None

    def release_cached_memory(self) -> None:
        """Return memory to the device that torch keeps for later."""

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        """Return whether an error says that the memory of the device is full."""
        return isinstance(error, torch.OutOfMemoryError)

    def retry_with_freed_memory(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work`; if the memory is full, release what torch keeps of it, and run `work` once more."""
        try:
            return work()
        except RuntimeError as error:
            if not self.is_out_of_memory(error):
                raise
        self.release_cached_memory()  # after the except block, which holds the error and so the tensors of its frames
        return work()

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether the device computes in a precision at a useful speed."""
        return True
