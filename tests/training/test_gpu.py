"""Mixed precision, `torch.compile` and synchronized batch norm, which need a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from pipelines.training.learner import Learner
from tests.training.test_learner import TASK, config, local_batch, losses, module

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_learner_fits_a_batch_in_mixed_precision(precision: str) -> None:
    learner = Learner(config(model={"dtype": precision}, optim={"clip_grad": 5.0}), TASK, module(), GPU)
    for _ in range(40):
        learner.learn(local_batch(step=3))
    images, top1, _, _ = learner.measure(local_batch(step=3))["model"].tolist()
    assert (images, top1) == (8, 8)
    assert all(torch.isfinite(parameter).all() for parameter in learner.module.parameters())


def test_grad_scaler_resumes_from_the_state() -> None:
    whole = Learner(config(model={"dtype": "float16"}), TASK, module(), GPU)
    losses(whole, 3)
    resumed = Learner(config(model={"dtype": "float16"}), TASK, module(), GPU)
    resumed.load_state(whole.state())
    assert resumed.state()["scaler"] == whole.state()["scaler"]
    np.testing.assert_allclose(losses(resumed, 2), losses(whole, 2), rtol=1e-3)


def test_compiled_losses_match_eager() -> None:
    frozen = {"freeze_batch_norm": True}
    eager = losses(Learner(config(model=frozen), TASK, module(), GPU), 5)
    compiled = losses(Learner(config(model=frozen | {"compile": True}), TASK, module(), GPU), 5)
    np.testing.assert_allclose(compiled, eager, rtol=1e-2)


def _worker(rank: int, folder: str) -> None:
    torch.backends.cudnn.allow_tf32 = False  # the comparison needs convolutions in full precision
    # Unlike NCCL, gloo lets two workers use the same GPU.
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    sections: dict[str, Any] = {"model": {"sync_batch_norm": True}, "scaling": {"use_gpu": True, "num_workers": 2}}
    learner = Learner(config(**sections), TASK, module(), GPU, rank, world_size=2)
    torch.save(losses(learner, 20, start=rank * 4, stop=rank * 4 + 4), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_workers_with_synchronized_batch_norm_match_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = losses(Learner(config(), TASK, module(), GPU), 20)
    spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    np.testing.assert_allclose(np.add(first, second), expected, rtol=1e-3)
