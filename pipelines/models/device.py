"""The device that a replica computes on."""

import os

import torch

from pipelines.errors import RunError

# For tests only: the device of replicas that hold a GPU of a Ray to which GPUs were declared that are not there.
TEST_DEVICE_VARIABLE = "ECARAY_TEST_DEVICE"


def replica_device(use_gpu: bool) -> torch.device:
    """Return the device of this process: the GPU that Ray assigned to it, or the CPU.

    Args:
        use_gpu: whether Ray assigned a GPU to this process.

    Raises:
        RunError: Ray assigned a GPU that torch cannot use.
    """
    if not use_gpu:
        return torch.device("cpu")
    if forced := os.environ.get(TEST_DEVICE_VARIABLE):
        return torch.device(forced)
    if not torch.cuda.is_available():
        raise RunError(
            f"Ray assigned a GPU to this replica (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}) "
            f"that torch {torch.__version__} cannot use: check the driver with nvidia-smi on the node, or run with "
            "--compute.use_gpu false"
        )
    return torch.device("cuda")
