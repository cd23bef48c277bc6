"""Parsing of the command line and YAML files, and the help text."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config.base import Section, leaf_fields
from pipelines.config.benchmark import BenchmarkConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.export import ExportConfig
from pipelines.config.help import format_help
from pipelines.config.infer import InferConfig
from pipelines.config.models import ModelsConfig
from pipelines.config.parse import parse_config
from pipelines.config.train import TrainConfig
from pipelines.config.verify import VerifyConfig
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


def test_environment_variables_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", '{"name": "from-the-environment"}')
    monkeypatch.setenv("OUTPUTS", '{"topk": 99}')
    monkeypatch.setenv("model.name", "from-the-environment")
    config = parse_config(InferConfig, NEEDED)
    assert (config.model.name, config.outputs.topk) == ("ecaresnet50d", 5)


def test_is_set_is_true_even_for_the_default_value() -> None:
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
        ([*NEEDED, "stray"], "unexpected argument 'stray'"),
        ([*NEEDED, "--config", "absent.yaml"], "absent.yaml"),
        (["--input.uri", "s3://user:secret@bucket/x", "--output.uri", "out"], "credentials"),
        (["--input.uri", "https://host/x?X-Amz-Signature=abc", "--output.uri", "out"], "signature"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_config(InferConfig, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_error_for_unknown_key_in_a_file_lists_valid_keys(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "typo.yaml", {"input": {"uri": "in", "exlude": ["x"]}, "output": {"uri": "out"}})
    with pytest.raises(RequestError, match=r"unknown key input\.exlude .*input\.uri, input\.exclude"):
        parse_config(InferConfig, ["--config", path])


@pytest.mark.parametrize("content", ["[a, list]", "key: [unclosed", ""])
def test_files_that_are_not_configs_are_refused(tmp_path: Path, content: str) -> None:
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


@pytest.mark.parametrize(
    "pattern", ["[._]*", "[abc].txt", "[1]", "[1,2]*", "{thumbs,small}/*", 'a\\b"c', "Smith, John/*", "-x", "null", ""]
)
def test_shell_pattern_on_the_command_line_is_not_parsed(pattern: str) -> None:
    config = parse_config(InferConfig, [*NEEDED, "--input.exclude", pattern, "--input.exclude=*.json"])
    assert config.input.exclude == [pattern, "*.json"]


def test_patterns_can_be_given_as_a_json_list() -> None:
    config = parse_config(TrainConfig, [*TRAIN_NEEDED, "--data.train.exclude", '["Smith, John/*", "b"]'])
    assert config.data.train.exclude == ["Smith, John/*", "b"]


@pytest.mark.parametrize(
    ("schema", "key", "text", "value"),
    [
        (InferConfig, "compute.num_workers", "4", 4),
        (InferConfig, "compute.num_workers", "[4,16]", (4, 16)),
        (InferConfig, "compute.num_workers", "4,16", (4, 16)),
        (InferConfig, "compute.num_workers", "null", None),
        (InferConfig, "compute.resources_per_worker", '{"inferentia": 1}', {"inferentia": 1}),
        (InferConfig, "compute.resources_per_worker", "a=1,b=0.5", {"a": 1, "b": 0.5}),
        (InferConfig, "outputs.embedding", "false", False),
        (TrainConfig, "augment.scale", "0.5,1", (0.5, 1)),
        (TrainConfig, "optim.decay_milestones", "[3,6]", [3, 6]),
        (TrainConfig, "optim.decay_milestones", "3, 6", [3, 6]),
        (TrainConfig, "scaling.label_selector", '{"zone": "a"}', {"zone": "a"}),
        (ModelsConfig, "names", "a", ["a"]),
    ],
)
def test_values_of_every_type_are_parsed_from_the_command_line(
    schema: type[Section], key: str, text: str, value: object
) -> None:
    needed = {InferConfig: NEEDED, TrainConfig: TRAIN_NEEDED}.get(schema, [])
    found: Any = parse_config(schema, [*needed, f"--{key}", text])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


DEEP = '{"a":' * 100_000


COLLECTIONS = [
    (schema, needed, key)
    for schema, needed in ((InferConfig, NEEDED), (TrainConfig, TRAIN_NEEDED), (BenchmarkConfig, NEEDED))
    for key, field in leaf_fields(schema).items()
    if any(kind in str(field.annotation) for kind in ("list[int]", "tuple", "dict"))
]


@pytest.mark.parametrize(("schema", "needed", "key"), COLLECTIONS)
@pytest.mark.parametrize("text", ["[4,16", "{zone: a}", "{'a': 1}", "[[[[", "x", DEEP, "\x1b[31m"])
def test_malformed_lists_tuples_and_mappings_are_refused(
    schema: type[Section], needed: list[str], key: str, text: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_config(schema, [*needed, f"--{key}", text])
    assert str(caught.value).startswith(f"{key} = ")
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_wrong_value_for_a_union_is_one_error() -> None:
    with pytest.raises(RequestError, match=r"^compute\.num_workers = 'x': .*integer.*, or .*tuple$"):
        parse_config(InferConfig, [*NEEDED, "--compute.num_workers", "x"])


def test_only_required_keys_are_reported_as_missing() -> None:
    with pytest.raises(RequestError, match=r"^missing: --data\.train\.uri; missing: --output\.uri$"):
        parse_config(TrainConfig, [])


BILLION_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model:\n  name: a\nmodel:\n  name: b\n", "line 3, column 1: the key 'model' is given twice"),
        ("input:\n  uri: /a\n  uri: /b\n", "line 3, column 3: the key 'uri' is given twice"),
        ("model: " + "[" * 100_000, "nested too deeply"),
        ("model: " + "{a: " * 60 + "1" + "}" * 60, "nested more than 32 deep"),
        (BILLION_LAUGHS, "more than 20,000 values"),
        ("input: &a\n  uri: *a\n", "an alias contains itself"),
        ("1: 2\n", "the key 1 is not text"),
        ("? [a, b]\n: 2\n", "is not text"),
        ("model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("optim: 2024-99-99\n", "is not valid YAML"),
        ("optim: !!int ''\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("x" * 2_000_000, "larger than 1,048,576 bytes"),
        ("input:\n  uri: [" + "x, " * 5000 + "x]\n", r"input\.uri = \['x', .*\.\.\.: Input should be a valid string"),
    ],
)
def test_hostile_and_broken_yaml_is_refused_in_one_short_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RequestError, match=message) as caught:
        parse_config(InferConfig, ["--config", str(path)])
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_aliases_and_merge_keys_are_supported(tmp_path: Path) -> None:
    path = tmp_path / "alias.yaml"
    path.write_text("model: &m {name: a}\noutputs: {topk: 1}\npreprocess: {<<: {mode: fast}, image_size: 64}\n")
    config = parse_config(InferConfig, ["--config", str(path), *NEEDED])
    assert (config.model.name, config.preprocess.mode, config.preprocess.image_size) == ("a", "fast", 64)


def test_pipe_can_be_a_config_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=("model: {name: from-the-fifo}\n",))
    writer.start()
    config = parse_config(InferConfig, ["--config", str(fifo), *NEEDED])
    writer.join()
    assert config.model.name == "from-the-fifo"


def test_standard_input_can_be_a_config_file() -> None:
    command = [sys.executable, "-m", "jobs.infer", "--config", "/dev/stdin", *NEEDED, "--dry-run"]
    done = subprocess.run(
        command, cwd=REPOSITORY, input="model: {name: piped}\n", capture_output=True, text=True, timeout=60
    )
    assert '"name": "piped"' in done.stdout, done.stderr


def test_endless_files_are_refused() -> None:
    with pytest.raises(RequestError, match="larger than"):
        parse_config(InferConfig, ["--config", "/dev/zero", *NEEDED])


def test_control_characters_in_keys_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text('input: {uri: a, "\\e[31mred": 1}\n')
    for arguments in (["--config", str(path)], ["--input.\x1b]0;title\x07", "x"]):
        with pytest.raises(RequestError) as caught:
            parse_config(InferConfig, arguments)
        assert str(caught.value).isprintable()


def test_help_lists_every_key_without_importing_torch_or_ray() -> None:
    code = (
        "import sys; from pipelines.runtime.job import run_job; from pipelines.config.infer import InferConfig; "
        "status = run_job('jobs.infer', InferConfig, None, ['--help']); "
        "loaded = {'torch', 'ray', 'timm', 'pyarrow'} & set(sys.modules); "
        "assert not loaded, loaded; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name} " in done.stdout for name in leaf_fields(InferConfig))


def test_dry_run_prints_the_resolved_config_and_stops() -> None:
    done = run_command("jobs.infer", *NEEDED, "--outputs.topk", "3", "--dry-run", MODEL="x")
    assert done.returncode == 0
    assert InferConfig.model_validate_json(done.stdout).outputs.topk == 3


SCHEMAS: tuple[type[Section], ...] = (
    InferConfig,
    TrainConfig,
    EvaluateConfig,
    BenchmarkConfig,
    VerifyConfig,
    ExportConfig,
    ModelsConfig,
)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_is_described_and_no_description_states_a_default(schema: type[Section]) -> None:
    for key, field in leaf_fields(schema).items():
        assert field.description, key
        assert not re.search(r"[Dd]efault(s|:| is)", field.description), key


def test_help_shows_the_defaults_of_the_schema() -> None:
    lines = format_help(TrainConfig, "jobs.train").splitlines()
    for expected in (
        "  --output.uri TEXT (required)",
        "  --augment.ratio X,X (default: 0.75,1.333)",
        "  --optim.epochs N (default: 100)",
        "  --optim.lr X",
        "  --optim.weight_decay X (default: 0.0001)",
        "  --optim.decay_milestones N[,...] (default: none)",
        "  --model.dtype {float32,bfloat16,float16} (default: float32)",
        "  --data.max_bytes N (default: 268_435_456)",
        "  --scaling.resources_per_worker JSON (default: none)",
    ):
        assert expected in lines, [line for line in lines if expected.split()[0] in line]


def test_help_names_the_type_of_an_optional_range() -> None:
    assert "  --compute.num_workers N or N,N" in format_help(InferConfig, "jobs.infer").splitlines()
