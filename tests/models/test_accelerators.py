"""Accelerators, as far as they can be tested without a GPU, and the CPU as an accelerator."""

import numpy as np
import pytest
import torch

from pipelines.errors import RunError
from pipelines.models import accelerators
from pipelines.models.accelerators import choose_accelerator, replica_accelerator
from pipelines.models.accelerators.base import Accelerator
from pipelines.models.accelerators.cuda import CudaAccelerator

CPU = torch.device("cpu")


class SmallMemory(Accelerator):
    """Device whose memory is full until it is released."""

    is_full = True

    def release_cached_memory(self) -> None:
        self.is_full = False

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        return "full" in str(error)

    def work(self) -> torch.Tensor:
        if self.is_full:
            raise RuntimeError("the memory is full")
        return torch.ones(3)


def test_each_device_has_its_accelerator() -> None:
    assert type(choose_accelerator(CPU)) is Accelerator
    assert type(choose_accelerator(torch.device("cuda"))) is CudaAccelerator


def test_cpu_uploads_and_downloads_synchronously() -> None:
    cpu = choose_accelerator(CPU)
    uploaded = cpu.side_stream().upload(torch.arange(4))
    doubled = cpu.side_stream().run(lambda: uploaded * 2)
    (downloaded,) = cpu.download([doubled]).wait()
    assert np.array_equal(downloaded, [0, 2, 4, 6])
    assert cpu.used_bytes() is None
    assert not cpu.runs_one_batch_at_a_time


def test_work_is_retried_once_after_memory_is_freed() -> None:
    device = SmallMemory(CPU)
    assert device.retry_with_freed_memory(device.work).tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="something else"):
        device.retry_with_freed_memory(lambda: _fail("something else"))
    with pytest.raises(RuntimeError, match="still full"):
        device.retry_with_freed_memory(lambda: _fail("still full"))


def _fail(message: str) -> torch.Tensor:
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("cuDNN error: unable to find an engine to execute this computation", True),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("an illegal memory access was encountered", False),
    ],
)
def test_messages_of_cudnn_and_cublas_mean_out_of_memory(message: str, expected: bool) -> None:
    assert CudaAccelerator(torch.device("cuda")).is_out_of_memory(RuntimeError(message)) is expected


def test_torchs_own_error_means_out_of_memory() -> None:
    assert CudaAccelerator(torch.device("cuda")).is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not Accelerator(CPU).is_out_of_memory(RuntimeError("out of memory"))


def test_gpu_that_torch_cannot_use_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(accelerators.TEST_DEVICE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RunError, match=r"Ray assigned a GPU .*CUDA_VISIBLE_DEVICES='0'.* nvidia-smi"):
        replica_accelerator(use_gpu=True)
