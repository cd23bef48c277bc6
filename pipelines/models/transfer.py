"""Between host memory and a device, beside what the device is computing. Not measured on a GPU yet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray


class SideStream:
    """Work for a device beside what it is computing: on a GPU, on a stream of its own.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the work makes; what is computed from it waits for it, this thread does not."""
        if self._stream is None:
            return work()
        with torch.cuda.stream(self._stream):
            made = work()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        made.record_stream(computing)  # its memory is not handed out again before that stream is done with it
        return made

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; from the host it goes by pinned memory."""
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self.device)
        return self(lambda: tensor.pin_memory().to(self.device, non_blocking=True))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a GPU's memory is full; cuDNN and cuBLAS say it in words of their own."""
    in_other_words = ("unable to find an engine", "ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in in_other_words)


def with_freed_memory(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the work makes; where a GPU's memory is full, once more without what torch keeps of it for later."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # here, where the error and what it holds are gone
    return work()


class Download:
    """Results on their way to the host, since they were asked for.

    Args:
        tensors: on one device; copied once they are computed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._is_there: Any = None
        if any(tensor.is_cuda for tensor in tensors):
            # Blocking: to wait is to sleep. Otherwise each thread of a replica keeps a core busy meanwhile.
            self._is_there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._is_there.record()

    def wait(self) -> list[NDArray[Any]]:
        """The results; meanwhile other threads have Python to themselves."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return [copy.numpy() for copy in self._copies]
