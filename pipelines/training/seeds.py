"""Random draws derived from the position in the run, so that no checkpoint has to hold a generator's state."""

import random

import numpy as np


def seed_generators(*key: int) -> None:
    """Seed the three generators that timm and torchvision draw from: Python's, NumPy's and torch's.

    Args:
        key: Numbers that determine the draws, such as seed, epoch and id.
    """
    import torch  # late: Ray tasks that unpickle this module need torch only when they draw

    draws = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(draws[0]))
    np.random.seed(int(draws[1]))
    torch.manual_seed(int(draws[2]))
