"""Training steps on CPUs, without Ray; the test of two workers uses gloo."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import distributed
from torch.multiprocessing.spawn import spawn

from pipelines.config.train import TrainConfig
from pipelines.training.batches import PADDING_ID
from pipelines.training.learner import MIN_SCALE, Learner, Task
from pipelines.training.recipe import make_ema, make_mixup

CPU = torch.device("cpu")
TASK = Task("ecaresnet26t", num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3, steps_per_epoch=5)


def config(**sections: Any) -> TrainConfig:
    base: dict[str, Any] = {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}}
    base["optim"] = {"global_batch_size": 8, "epochs": 4, "lr": 0.05, **sections.pop("optim", {})}
    return TrainConfig.model_validate(base | sections)


def module(num_classes: int = 4) -> Any:
    torch.manual_seed(0)
    return timm.create_model(TASK.architecture, num_classes=num_classes)


def local_batch(step: int = 0, start: int = 0, stop: int = 8) -> dict[str, NDArray[Any]]:
    """Return rows of a global batch of 8 images whose colour depends on their class."""
    random: Any = np.random.default_rng(step)
    target = random.integers(0, 4, 8)
    image = random.integers(0, 60, (8, 32, 32, 3)).astype(np.uint8)
    image[..., 0] += (target * 60)[:, None, None].astype(np.uint8)
    rows: dict[str, NDArray[Any]] = {"id": np.arange(8), "target": target, "image": image}
    rows["error"] = np.array([""] * 8, dtype=object)
    return {name: values[start:stop] for name, values in rows.items()}


def losses(learner: Learner, num_steps: int, start: int = 0, stop: int = 8) -> list[float]:
    return [float(learner.learn(local_batch(learner.step, start, stop))) for _ in range(num_steps)]


def weights_of(learner: Learner) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in learner.module.state_dict().values()]


def test_learner_fits_a_batch() -> None:
    learner = Learner(config(), TASK, module(), CPU)
    for _ in range(40):  # enough for batch norm's running statistics to converge
        learner.learn(local_batch(step=3))
    images, top1, top5, _ = learner.measure(local_batch(step=3))["model"].tolist()
    assert (images, top1, top5) == (8, 8, 8)


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"ema_decay": 0.9, "clip_grad": 1.0, "opt": "lamb", "lr": 0.01}},
        {"augment": {"mixup": 0.2, "cutmix": 1.0, "random_erase_prob": 0.5}, "optim": {"bce_loss": True}},
        {"model": {"drop_path_rate": 0.1}, "optim": {"grad_accum_steps": 2, "sched": "step", "decay_epochs": 1}},
        {"model": {"dtype": "bfloat16"}, "optim": {"label_smoothing": 0.1}},
    ],
)
def test_resume_is_bit_exact(sections: dict[str, Any]) -> None:
    whole = Learner(config(**sections), TASK, module(), CPU)
    losses(whole, 3)
    file = io.BytesIO()
    torch.save(whole.state(), file)
    expected = losses(whole, 3)
    file.seek(0)
    resumed = Learner(config(**sections), TASK, module(), CPU)
    resumed.load_state(torch.load(file, weights_only=True))
    assert losses(resumed, 3) == expected
    assert resumed.lr == whole.lr
    assert all(map(torch.equal, weights_of(resumed), weights_of(whole)))


def test_learning_rate_follows_the_schedule() -> None:
    learner = Learner(
        config(optim={"sched": "step", "decay_epochs": 2, "warmup_epochs": 1, "epochs": 4}), TASK, module(), CPU
    )
    rates = []
    for _ in range(20):
        rates.append(round(learner.lr, 6))
        learner.learn(local_batch(stop=2))
    assert rates[0] == 1e-5
    assert rates[1:5] == sorted(rates[1:5])
    assert rates[5:10] == [0.05] * 5
    assert rates[10:20] == [0.005] * 10


def test_failed_and_padding_rows_have_no_effect() -> None:
    rows = local_batch()
    rows["error"][2] = "corrupt: x"
    rows["id"][5] = PADDING_ID
    learner, other = (Learner(config(), TASK, module(), CPU) for _ in range(2))
    assert learner.measure(rows)["model"][0] == 6
    changed = {name: values.copy() for name, values in rows.items()}
    changed["image"][[2, 5]] = 255
    assert learner.learn(rows) == other.learn(changed)
    assert all(map(torch.equal, weights_of(learner), weights_of(other)))


@pytest.mark.parametrize("num_good", [0, 1, 3])
@pytest.mark.parametrize("sections", [{}, {"augment": {"mixup": 0.2}}])
def test_local_batch_with_few_good_images_trains(num_good: int, sections: dict[str, Any]) -> None:
    rows = local_batch()
    rows["error"][num_good:] = "corrupt: x"
    learner = Learner(config(optim={"grad_accum_steps": 4}, **sections), TASK, module(), CPU)
    passes = []
    learner._model.register_forward_hook(lambda model, images, logits: passes.append(len(images[0])))
    loss = float(learner.learn(rows))
    assert passes == [2, 2, 2, 2]  # the same on every worker
    assert np.isfinite(loss)
    assert (loss == 0) == (num_good == 0)


def test_weight_of_a_good_image_does_not_depend_on_failures() -> None:
    rows, others = local_batch(), local_batch()
    rows["error"][1:] = "corrupt: x"
    others["image"][1:], others["target"][1:] = others["image"][0], others["target"][0]
    alone, among = (Learner(config(), TASK, module(), CPU) for _ in range(2))
    assert float(alone.learn(rows)) == pytest.approx(float(among.learn(others)) / 8, rel=1e-5)


def test_frozen_backbone_does_not_change() -> None:
    learner = Learner(config(model={"freeze_backbone": True}), TASK, module(), CPU)
    before = {name: tensor.clone() for name, tensor in learner.module.state_dict().items()}
    losses(learner, 2)
    after = learner.module.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head"} or changed == {"fc"}


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("mobilenetv3_small_050", 64), ("convnext_atto", 64), ("deit_tiny_distilled_patch16_224", 224)],
)
def test_timm_classifiers_train_for_two_steps(name: str, size: int) -> None:
    task = Task(name, num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3, steps_per_epoch=5)
    rows = local_batch(stop=4)
    rows["image"] = np.repeat(np.repeat(rows["image"], size // 32, axis=1), size // 32, axis=2)
    for frozen in (False, True):
        model = {"freeze_backbone": frozen}
        learner = Learner(config(model=model), task, timm.create_model(name, num_classes=4), CPU)
        assert np.isfinite([float(learner.learn(rows)) for _ in range(2)]).all()
        assert learner.measure(rows)["model"][0] == 4


def test_ema_differs_from_the_model_and_is_measured_too() -> None:
    learner = Learner(config(optim={"ema_decay": 0.5}), TASK, module(), CPU)
    losses(learner, 4)
    assert learner.ema is not None
    assert not torch.equal(learner.module.fc.weight, learner.ema.module.fc.weight)
    assert set(learner.measure(local_batch())) == {"model", "average"}


TINY = Task("test_resnet", num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3, steps_per_epoch=5)


def tiny_learner(**sections: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(config(**sections), TINY, timm.create_model(TINY.architecture, num_classes=4), CPU)


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_equals_timms(warmup: bool) -> None:
    learner = tiny_learner(optim={"ema_decay": 0.9, "ema_warmup": warmup})
    theirs = ModelEmaV3(learner.module, decay=0.9, use_warmup=warmup)
    for step in range(1, 5):
        learner.learn(local_batch(step))
        theirs.update(learner.module, step=step)
    assert learner.ema is not None
    expected = theirs.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in learner.ema.module.state_dict().items())


def test_ema_warms_up_by_default() -> None:
    module = torch.nn.Linear(2, 2)
    warm, flat = (
        make_ema(config(optim={"ema_decay": 0.999, **optim}), module) for optim in ({}, {"ema_warmup": False})
    )
    assert warm is not None
    assert flat is not None
    assert warm.get_decay(10) < 0.8
    assert warm.get_decay(10**6) == flat.get_decay(10) == 0.999


@pytest.mark.parametrize(
    ("optim", "num_steps", "expected"),
    [
        ({}, 10**6, "model"),
        ({"ema_decay": 0.999}, 1, "model"),
        ({"ema_decay": 0.999}, 36, "model"),
        ({"ema_decay": 0.999}, 360, "average"),
        ({"ema_decay": 0.999, "ema_warmup": False}, 360, "model"),
        ({"ema_decay": 0.999, "ema_warmup": False}, 5001, "average"),
        ({"ema_decay": 0.5, "ema_warmup": False}, 36, "average"),
    ],
)
def test_ema_is_preferred_once_its_window_is_a_small_fraction_of_the_steps(
    optim: dict[str, Any], num_steps: int, expected: str
) -> None:
    learner = tiny_learner(optim=optim)
    learner.step = num_steps
    assert learner.preferred_weights == expected
    chosen = learner.weights(learner.preferred_weights)
    assert (chosen is learner.module) == (expected == "model")


def record_passes(learner: Learner) -> list[torch.Tensor]:
    """Return a list that receives the input images of each forward pass."""
    passes: list[torch.Tensor] = []
    learner._model.register_forward_pre_hook(lambda model, images: passes.append(images[0].clone()))
    return passes


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixup_of_even_batches_equals_timms(mixing: dict[str, float]) -> None:
    images, target = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    theirs: Any = Mixup(mixing.get("mixup", 0.0), mixing.get("cutmix", 0.0), label_smoothing=0.1, num_classes=4)
    ours = make_mixup(config(augment=mixing, optim={"label_smoothing": 0.1}), num_classes=4)
    assert ours is not None
    for seed in range(5):
        np.random.seed(seed)
        expected = theirs(images.clone(), target)
        np.random.seed(seed)
        assert all(map(torch.equal, ours(images.clone(), target), expected))


@pytest.mark.parametrize(
    ("num_rows", "num_failed", "grad_accum_steps", "passes"),
    [(7, 0, 1, [7]), (6, 0, 2, [3, 3]), (8, 1, 1, [7]), (8, 2, 2, [3, 3]), (3, 0, 1, [3]), (1, 0, 1, [2])],
)
@pytest.mark.parametrize("sections", [{}, {"augment": {"mixup": 0.2}}, {"augment": {"cutmix": 1.0}}])
def test_every_good_image_counts_once_in_odd_batches(
    num_rows: int, num_failed: int, grad_accum_steps: int, passes: list[int], sections: dict[str, Any]
) -> None:
    rows = local_batch(stop=num_rows)
    rows["error"][:num_failed] = "corrupt: x"
    learner = tiny_learner(optim={"grad_accum_steps": grad_accum_steps}, **sections)
    learner._train_loss = ConstantLoss()
    seen = record_passes(learner)
    # With a loss of 1 per image, the mean is the fraction of good images in the global batch of 8.
    assert float(learner.learn(rows)) == pytest.approx((num_rows - num_failed) / 8)
    assert [len(images) for images in seen] == passes


class ConstantLoss(torch.nn.Module):
    """Loss of 1 for every image."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 1 + 0 * logits.mean()


@pytest.mark.parametrize("num_good", [3, 5, 7])
def test_repeating_images_of_a_short_batch_does_not_change_their_weight(num_good: int) -> None:
    frozen = {"freeze_batch_norm": True}  # makes the result independent of the number of passes
    many, one = tiny_learner(model=frozen, optim={"grad_accum_steps": 4}), tiny_learner(model=frozen)
    rows = local_batch()
    rows["error"][num_good:] = "corrupt: x"
    assert float(many.learn(rows)) == pytest.approx(float(one.learn(rows)), rel=1e-5)
    for mine, other in zip(weights_of(many), weights_of(one), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_mixup_leaves_the_middle_image_of_an_odd_batch_unchanged() -> None:
    images, target = torch.rand(5, 3, 32, 32), torch.arange(5) % 4
    mixup = make_mixup(config(augment={"mixup": 1.0}), num_classes=4)
    assert mixup is not None
    mixed, soft = mixup(images.clone(), target)
    torch.testing.assert_close(mixed[2], images[2])
    torch.testing.assert_close(soft[2], torch.eye(4)[2])
    assert not torch.equal(mixed[0], images[0])
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("where", ["parameter", "statistics", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_found(where: str, value: float) -> None:
    learner = tiny_learner(optim={"ema_decay": 0.9})
    assert not learner.is_broken()
    assert learner.ema is not None
    norm = next(module for module in learner.module.modules() if isinstance(module, torch.nn.BatchNorm2d))
    tensors = {
        "parameter": learner.module.fc.weight,
        "statistics": norm.running_var,
        "ema": learner.ema.module.fc.bias,
    }
    with torch.no_grad():
        tensors[where].view(-1)[0] = value
    assert learner.is_broken()


def test_vanished_gradient_scale_is_found() -> None:
    learner = tiny_learner(model={"dtype": "float16"})
    assert learner.is_scaled
    assert learner._scaler is not None
    scaler = learner._scaler._scaler
    scaler.scale(torch.ones(()))  # creates the scale
    assert not learner.is_broken()
    scaler.update(MIN_SCALE / 2)
    assert learner.is_broken()


def test_nan_logits_are_not_hits() -> None:
    learner = tiny_learner()
    rows = local_batch()
    rows["target"][:] = 0
    with torch.no_grad():
        learner.module.fc.bias.fill_(float("nan"))
    images, top1, top5, loss = learner.measure(rows)["model"].tolist()
    assert (images, top1, top5) == (8, 0, 0)
    assert np.isnan(loss)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    learner = Learner(config(model={"freeze_batch_norm": True}), TASK, module(), CPU, rank, world_size=2)
    found = losses(learner, 20, start=rank * 4, stop=rank * 4 + 4)
    learner.sync_batch_norm_statistics()
    torch.save({"losses": found, "weights": weights_of(learner)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_workers_match_one_worker(tmp_path: Path) -> None:
    alone = Learner(config(model={"freeze_batch_norm": True}), TASK, module(), CPU)
    expected = losses(alone, 20)
    spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    np.testing.assert_allclose(np.add(first["losses"], second["losses"]), expected, rtol=1e-3)
    assert all(map(torch.equal, first["weights"], second["weights"]))
