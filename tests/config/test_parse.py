from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config.base import Section, leaf_fields
from pipelines.config.benchmark import BenchmarkConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.export import ExportConfig
from pipelines.config.infer import InferConfig
from pipelines.config.models import ModelsConfig
from pipelines.config.parse import parse_config
from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from tests.support.infer import REPOSITORY, run_command

NEEDED = ["--input.uri", "in", "--output.uri", "out"]
TRAIN_NEEDED = ["--data.train.uri", "in", "--output.uri", "out"]


def write_yaml(path: Path, content: object) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_command_line_wins_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    first = write_yaml(tmp_path / "1.yaml", {"outputs": {"topk": 1, "embedding": False}, "model": {"name": "a"}})
    second = write_yaml(tmp_path / "2.yaml", {"outputs": {"topk": 2}, "model": {"name": "b"}})
    config = parse_config(InferConfig, ["--config", first, "--config", second, *NEEDED, "--model.name", "c"])
    assert (config.outputs.topk, config.outputs.embedding, config.model.name) == (2, False, "c")


def test_environment_is_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", '{"name": "from-the-environment"}')
    monkeypatch.setenv("OUTPUTS", '{"topk": 99}')
    monkeypatch.setenv("model.name", "from-the-environment")
    config = parse_config(InferConfig, NEEDED)
    assert (config.model.name, config.outputs.topk) == ("ecaresnet50d", 5)


def test_what_the_user_said_is_known_even_where_it_is_the_default() -> None:
    assert not parse_config(InferConfig, NEEDED).outputs.is_set("topk")
    assert parse_config(InferConfig, [*NEEDED, "--outputs.topk", "5"]).outputs.is_set("topk")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NEEDED, "--model.nam", "x"], "unknown key model.nam, did you mean model.name?"),
        ([*NEEDED, "--nonsense", "x"], "unknown key nonsense"),
        (["--input.uri", "in"], "missing: --output.uri"),
        ([*NEEDED, "--outputs.topk", "-1"], "outputs.topk"),
        ([*NEEDED, "--outputs.topk", "0", "--outputs.embedding", "false"], "nothing to write"),
        ([*NEEDED, "--preprocess.mode", "sloppy"], "preprocess.mode"),
        ([*NEEDED, "--preprocess.mode", "cuda"], "preprocess.mode=cuda decodes on GPUs (compute.use_gpu)"),
        ([*NEEDED, "--outputs.embedding"], "--outputs.embedding needs a value"),
        ([*NEEDED, "--outputs.embedding", "--model.name", "x"], "--outputs.embedding needs a value"),
        ([*NEEDED, "stray"], "cannot make sense of 'stray'"),
        ([*NEEDED, "--config", "absent.yaml"], "absent.yaml"),
        (["--input.uri", "s3://user:secret@bucket/x", "--output.uri", "out"], "credentials"),
        (["--input.uri", "https://host/x?X-Amz-Signature=abc", "--output.uri", "out"], "signature"),
    ],
)
def test_wrong_requests_are_explained_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_config(InferConfig, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_unknown_key_in_a_file_lists_the_valid_ones(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "typo.yaml", {"input": {"uri": "in", "exlude": ["x"]}, "output": {"uri": "out"}})
    with pytest.raises(RequestError, match=r"unknown key input\.exlude .*input\.uri, input\.exclude"):
        parse_config(InferConfig, ["--config", path])


@pytest.mark.parametrize("content", ["[a, list]", "key: [unclosed", ""])
def test_files_that_are_no_config_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"bad\.yaml"):
        parse_config(InferConfig, ["--config", str(path), *NEEDED])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_loads(path: Path) -> None:
    schema, needed = (TrainConfig, TRAIN_NEEDED) if path.parent.name == "train" else (InferConfig, NEEDED)
    config: Any = parse_config(schema, ["--config", str(path), *needed])
    assert config.output.uri == "out"


@pytest.mark.parametrize(
    "schema", [InferConfig, TrainConfig, EvaluateConfig, ExportConfig, ModelsConfig, BenchmarkConfig]
)
def test_every_key_has_a_docstring(schema: type[Section]) -> None:
    missing = [name for name, field in leaf_fields(schema).items() if not field.description]
    assert not missing


def test_help_names_every_key_and_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from pipelines.job import run_job; from pipelines.config.infer import InferConfig; "
        "status = run_job('jobs.infer', InferConfig, None, ['--help']); "
        "loaded = {'torch', 'ray', 'timm', 'pyarrow'} & set(sys.modules); "
        "assert not loaded, loaded; sys.exit(status)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name} " in done.stdout for name in leaf_fields(InferConfig))


def test_dry_run_prints_the_resolved_config_and_stops() -> None:
    done = run_command("jobs.infer", *NEEDED, "--outputs.topk", "3", "--dry-run", MODEL="x")
    assert done.returncode == 0
    assert InferConfig.model_validate_json(done.stdout).outputs.topk == 3
