"""Random draws that follow from where a run is, so that no checkpoint has to hold a generator."""

import random

import numpy as np


def seed_generators(*key: int) -> None:
    """Seed the three generators that timm and torchvision draw from: Python's, NumPy's and torch's.

    Args:
        key: what the draws follow from, such as seed, epoch and id.
    """
    import torch  # late: Ray's tasks unpickle what names this module before they need torch

    draws = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(draws[0]))
    np.random.seed(int(draws[1]))
    torch.manual_seed(int(draws[2]))
