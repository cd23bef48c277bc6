"""Accelerators: devices with their streams, memory and precisions. The CPU is one too."""

import os

import torch

from pipelines.errors import RunError
from pipelines.models.accelerators.base import Accelerator as Accelerator
from pipelines.models.accelerators.cuda import CudaAccelerator

# For tests only: device for replicas whose GPU was declared to Ray but does not exist.
TEST_DEVICE_VARIABLE = "ECARAY_TEST_DEVICE"


def choose_accelerator(device: torch.device) -> Accelerator:
    """Return the accelerator for a torch device."""
    return CudaAccelerator(device) if device.type == "cuda" else Accelerator(device)


def replica_accelerator(use_gpu: bool) -> Accelerator:
    """Return the accelerator of this process: the GPU that Ray assigned to it, or the CPU.

    Args:
        use_gpu: True if Ray assigned a GPU to this process.

    Raises:
        RunError: Ray assigned a GPU that torch cannot use.
    """
    if not use_gpu:
        return choose_accelerator(torch.device("cpu"))
    if forced := os.environ.get(TEST_DEVICE_VARIABLE):
        return choose_accelerator(torch.device(forced))
    if not torch.cuda.is_available():
        raise RunError(
            f"Ray assigned a GPU to this replica (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}) "
            f"that torch {torch.__version__} cannot use: check the driver with nvidia-smi on the node, or run with "
            "--compute.use_gpu false"
        )
    return choose_accelerator(torch.device("cuda"))
