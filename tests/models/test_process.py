"""Separate process that resolves the model."""

import os
import pickle
import signal
import subprocess
import sys

import pytest
import timm
import torch

from cluster.local.processes import is_running, wait_until_gone
from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.errors import RequestError, RunError
from pipelines.models.process import ModelProcess
from pipelines.models.resolve import resolve_bundle
from tests.support.infer import REPOSITORY

SMALL = "ecaresnet26t"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(timm.create_model(SMALL, num_classes=7).state_dict(), path)
    return ModelConfig(name=SMALL, weights=str(path))


def test_process_returns_the_same_model_as_a_local_call(config: ModelConfig) -> None:
    here = resolve_bundle(config, PreprocessConfig())
    with ModelProcess(config, PreprocessConfig()) as process:
        assert process.facts() == here.facts()
        bundle = pickle.loads(process.pickled_bundle())
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert not isinstance(here.module, bytes)
        for ours, theirs in zip(here.module(images), bundle.module(images)):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_request_error_is_raised_in_the_driver() -> None:
    unknown = ModelProcess(ModelConfig(name="ecaresnot"), PreprocessConfig())
    with unknown as process, pytest.raises(RequestError, match="knows no model 'ecaresnot'"):
        process.facts()


def test_death_of_the_process_is_reported_with_its_status(config: ModelConfig) -> None:
    with ModelProcess(config, PreprocessConfig()) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="status -9"):
            process.facts()


def test_process_ends_with_the_block_and_with_its_parent(config: ModelConfig) -> None:
    with ModelProcess(config, PreprocessConfig()) as process:
        pid = process.pid
    assert not is_running(pid)
    code = (
        "import sys, time; from pipelines.config.sections import *; from pipelines.models.process import ModelProcess; "
        f"p = ModelProcess(ModelConfig(name={SMALL!r}, weights={config.weights!r}), PreprocessConfig()); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_until_gone(pid)
