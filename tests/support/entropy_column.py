"""Column with the entropy of the predicted distribution, as a user of this project would write it.

It is the example of the page "Extend it".
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.outputs.columns import Model, Tolerance


class Entropy:
    """Entropy of the predicted distribution in nats: 0 for a certain prediction, log(num_classes) for a uniform one."""

    name = "entropy"

    def fields(self, model: Model) -> list[pa.Field]:
        """Return the one field of this column."""
        return [pa.field("entropy", pa.float32())]

    def compute(self, logits: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
        """Compute the entropy of each image of the batch on the device."""
        log_prob = logits.float().log_softmax(dim=-1)
        return [-(log_prob.exp() * log_prob).sum(dim=-1)]

    def arrays(self, values: list[NDArray[Any]], model: Model) -> list[pa.Array]:
        """Convert the copied values to an Arrow array."""
        return [pa.array(values[0])]

    def difference(self, old: dict[str, Any], new: dict[str, Any], tolerance: Tolerance) -> str | None:
        """Compare a row with the same row computed again."""
        distance = np.abs(old["entropy"] - new["entropy"])
        return f"the entropy was {old['entropy']:.4f}, and is now {new['entropy']:.4f}" if distance > 0.01 else None
