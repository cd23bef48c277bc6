"""Between host memory and a device, beside what the device is computing. Not measured on a GPU yet."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray


class Upload:
    """Copies tensors to a device. On a GPU from pinned memory and on a stream of its own, so that nobody waits.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; what is computed from it waits for the copy, this thread does not."""
        if self._stream is None:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            uploaded = tensor.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        uploaded.record_stream(computing)  # its memory is not handed out again before that stream is done with it
        return uploaded


class Download:
    """Results on their way to the host, since they were asked for.

    Args:
        tensors: on one device; copied once they are computed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._is_there: Any = None
        if any(tensor.is_cuda for tensor in tensors):
            self._is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_there.record()

    def wait(self) -> list[NDArray[Any]]:
        """The results; meanwhile other threads have Python to themselves."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return [copy.numpy() for copy in self._copies]
