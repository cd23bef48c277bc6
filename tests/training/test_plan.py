"""Plan of a run as a dry run logs it, and requests that it rejects before Ray starts."""

from typing import Any

import pytest
import timm
import torch

from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.runtime.nodes import Node
from pipelines.training.plan import plan_training
from pipelines.training.start import resolve_start

SMALL = "ecaresnet26t"


def plan(num_train: int = 1000, **sections: Any) -> Any:
    base = {"data": {"train": {"uri": "x"}}, "output": {"uri": "y"}, "preprocess": {"image_size": 64}}
    base |= {"model": {"name": SMALL, "weights": "random"}, "optim": {}}
    base["optim"] = {"global_batch_size": 64, "epochs": 10} | sections.pop("optim", {})
    config = TrainConfig.model_validate(base | sections)
    return plan_training(config, resolve_start(config, ["a", "b", "c"]), num_train, 100)


def test_plan_counts_steps_and_lists_learning_rates() -> None:
    found = plan(optim={"lr": 0.2, "sched": "step", "decay_epochs": 4, "warmup_epochs": 1}, scaling={"num_workers": 4})
    assert (found.steps_per_epoch, found.num_left_out, found.total_steps, found.batch_size_per_pass) == (
        15,
        40,
        150,
        16,
    )
    rates = dict(found.rates)
    assert rates[1] == pytest.approx(1e-5)
    assert (rates[2], rates[5], rates[10]) == (0.2, pytest.approx(0.02), pytest.approx(0.002))
    text = "\n".join(found.lines())
    assert "15 steps per epoch (40 images left out of each)" in text
    assert "3 classes" in text


@pytest.mark.parametrize(("opt", "num_copies"), [("sgd", 3), ("adamw", 4), ("lamb", 4)])
def test_state_memory_includes_gradients_and_optimizer(opt: str, num_copies: int) -> None:
    found = plan(optim={"opt": opt})
    num_parameters = sum(tensor.numel() for tensor in timm.create_model(SMALL, num_classes=3).parameters())
    assert found.num_parameters == found.num_trained == num_parameters
    assert found.state_bytes == pytest.approx(4 * num_copies * num_parameters, rel=1e-3)


def test_activation_memory_matches_what_autograd_keeps() -> None:
    model = timm.create_model(SMALL, num_classes=3).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(16, 3, 64, 64))
    measured = sum(num_bytes for place, num_bytes in kept.items() if place not in own)
    assert plan(optim={"global_batch_size": 16}).activation_bytes == pytest.approx(measured, rel=0.1)


def test_frozen_backbone_needs_less_memory() -> None:
    whole, head = plan(), plan(model={"name": SMALL, "weights": "random", "freeze_backbone": True})
    assert head.num_trained == 3 * 2048 + 3
    assert head.state_bytes < whole.state_bytes / 2
    assert head.activation_bytes < whole.activation_bytes / 10


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"opt": "adamx"}}, "knows no optimizer 'adamx', did you mean"),
        ({"optim": {"opt": "fusedsgd"}}, "CUDA"),
        ({"optim": {"global_batch_size": 2000}}, "1000 training images are fewer than one batch"),
        ({"augment": {"auto_augment": "nonsense"}}, "augment.auto_augment = 'nonsense'"),
        (
            {"augment": {"auto_augment": "randaug"}},
            "augment.auto_augment = 'randaug': timm does not know it; timm takes",
        ),
        ({"augment": {"auto_augment": "rand-foo"}}, "timm does not know 'foo'"),
        ({"augment": {"auto_augment": "rand-m9-tfoo1"}}, "timm does not know 'tfoo1'"),
        ({"augment": {"auto_augment": "rand-x9"}}, "Unknown RandAugment config section"),
        ({"augment": {"auto_augment": "augmix-mfive"}}, "timm does not know 'mfive'"),
        ({"optim": {"opt": "adahessian"}}, "adahessian needs second derivatives"),
        (
            {"model": {"name": "densenet121", "weights": "random", "drop_path_rate": 0.1}},
            "densenet121 does not support",
        ),
    ],
)
def test_invalid_recipe_is_rejected_in_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plan(**sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sched", ["cosine", "step", "multistep", "poly", "tanh", "constant"])
def test_every_schedule_of_the_config_decays_as_timms(sched: str) -> None:
    rates = plan(optim={"sched": sched, "lr": 0.1, "decay_milestones": [3], "decay_epochs": 5}).rates
    assert rates[0] == (1, pytest.approx(0.1))
    assert (rates[-1][1] == 0.1) == (sched == "constant")


@pytest.mark.parametrize(
    "policy", ["original", "v0-mstd0.5", "3a", "rand-m7-mstd0.5-inc1", "rand-tweights", "augmix-m5-w4"]
)
def test_known_automatic_augmentation_is_accepted(policy: str) -> None:
    assert plan(augment={"auto_augment": policy})


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"global_batch_size": 32}, "optim.lr is not set: 0.0125 = 0.1 x 32 / 256"),
        ({"global_batch_size": 64, "opt": "adamw"}, "optim.lr is not set: 0.05 = 0.1 x sqrt(64 / 256)"),
        ({"global_batch_size": 64, "lr": 0.1}, None),
    ],
)
def test_default_learning_rate_is_explained(optim: dict[str, Any], expected: str | None) -> None:
    text = "\n".join(plan(optim=optim).lines())
    assert expected in text if expected else "not set" not in text


def test_memory_warning_names_the_numbers() -> None:
    found = plan()
    enough, half = Node(2, 0, memory_bytes=found.worker_bytes), Node(2, 0, memory_bytes=found.worker_bytes / 2)
    assert found.describe_memory_shortage([enough], num_workers=1) is None
    assert found.describe_memory_shortage([enough, enough], num_workers=2) is None
    for nodes, num_workers in (([half], 1), ([enough], 2), ([half, half], 1)):
        warning = found.describe_memory_shortage(nodes, num_workers)
        assert warning is not None
        assert f"{num_workers} need about" in warning
        assert "optim.grad_accum_steps" in warning
