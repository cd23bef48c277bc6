"""GPUs that torch exposes as `cuda`. Not measured on a GPU yet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from pipelines.models.accelerators.base import Accelerator, Download, SideStream

# Error messages of cuDNN and cuBLAS that mean "out of memory".
OUT_OF_MEMORY_MESSAGES = ("unable to find an engine", "ALLOC_FAILED")


class CudaSideStream(SideStream):
    """Side stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work` on the stream. The current stream waits for the result; the host does not."""
        with torch.cuda.stream(self._stream):
            result = work()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        result.record_stream(current)  # so that its memory is not reused before the current stream is done with it
        return result

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of the tensor on the device. Host tensors are copied through pinned memory."""
        if tensor.is_cuda:
            return tensor.to(self.device)
        return self.run(lambda: tensor.pin_memory().to(self.device, non_blocking=True))


class CudaDownload(Download):
    """Results on their way from a GPU to host memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(tensors)
        # Waiting for a blocking event sleeps. Otherwise each thread of a replica would keep a core busy.
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
        """Start copying tensors to host memory."""
        return CudaDownload(tensors)

    def synchronize(self) -> None:
        """Wait until the GPU has finished its work."""
        torch.cuda.synchronize(self.device)

    def synchronize_stream(self) -> None:
        """Wait until the GPU has finished the work of the current stream."""
        torch.cuda.current_stream(self.device).synchronize()

    def used_bytes(self) -> int:
        """Return the GPU memory in use by all processes, in bytes."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def release_cached_memory(self) -> None:
        """Release the GPU memory that torch caches."""
        torch.cuda.empty_cache()

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        """Return whether an error of torch, cuDNN or cuBLAS means that the GPU is out of memory."""
        return super().is_out_of_memory(error) or any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether the GPU supports a precision natively. GPUs before Ampere only emulate bfloat16."""
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
