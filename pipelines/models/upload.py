"""From host memory to the device, beside what the device is computing. Not measured on a GPU yet."""

import numpy as np
import torch
from numpy.typing import NDArray


class Upload:
    """Copies arrays to a device. On a GPU from pinned memory and on a stream of its own, so that nobody waits.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, array: NDArray[np.uint8]) -> torch.Tensor:
        """The array as a tensor on the device; what is computed from it waits for the copy, this thread does not."""
        tensor = torch.from_numpy(array)
        if self._stream is None:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            uploaded = tensor.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        uploaded.record_stream(computing)  # its memory is not handed out again before that stream is done with it
        return uploaded
