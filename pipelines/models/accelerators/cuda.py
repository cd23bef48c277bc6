"""GPUs that torch reaches as `cuda`. Not measured on a GPU yet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from pipelines.models.accelerators.base import Accelerator, Download, SideStream

# Messages of cuDNN and cuBLAS that mean "out of memory".
OTHER_MESSAGES = ("unable to find an engine", "ALLOC_FAILED")


class CudaSideStream(SideStream):
    """CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work` on the stream. The current stream waits for the result; the host does not."""
        with torch.cuda.stream(self._stream):
            made = work()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        made.record_stream(computing)  # keeps its memory from being reused before that stream is done with it
        return made

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the device; from the host it goes through pinned memory."""
        if tensor.is_cuda:
            return tensor.to(self.device)
        return self.run(lambda: tensor.pin_memory().to(self.device, non_blocking=True))


class CudaDownload(Download):
    """Results on their way from a GPU to host memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(tensors)
        # A blocking event sleeps while it waits. Otherwise each thread of a replica would keep a core busy.
        self._is_done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._is_done.record()

    def wait(self) -> list[NDArray[Any]]:
        """Wait for the results, and return them."""
        self._is_done.synchronize()
        return super().wait()


class CudaAccelerator(Accelerator):
    """One GPU."""

    runs_one_batch_at_a_time = True

    def side_stream(self) -> SideStream:
        """Return a new CUDA stream."""
        return CudaSideStream(self.device)

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Start to copy tensors to host memory."""
        return CudaDownload(tensors)

    def synchronize(self) -> None:
        """Wait until the GPU has finished its work."""
        torch.cuda.synchronize(self.device)

    def used_bytes(self) -> int:
        """Return the memory of the GPU that is in use, by all processes."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def release_cached_memory(self) -> None:
        """Return memory to the GPU that torch keeps for later."""
        torch.cuda.empty_cache()

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        """Return whether an error of torch, cuDNN or cuBLAS says that the memory of the GPU is full."""
        return super().is_out_of_memory(error) or any(message in str(error) for message in OTHER_MESSAGES)

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether the GPU computes in a precision; before Ampere, bfloat16 is emulated."""
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
