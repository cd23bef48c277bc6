"""The documentation: its length, links, paths, keys, commands, tables and examples agree with the code."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pyarrow as pa
import pytest

from pipelines.config.base import leaf_fields
from pipelines.config.infer import InferConfig
from pipelines.errors import ErrorKind
from pipelines.inputs.manifest import ManifestInfo
from pipelines.outputs import Output
from pipelines.outputs.commit_log import Commits
from pipelines.outputs.lease import Holder
from pipelines.outputs.run_record import PROGRESS_FORMAT, RUN_FILE, RunRecord, defaults_of
from pipelines.outputs.schema import failed_schema
from tests.support.infer import REPOSITORY
from tests.support.label_counts_job import LabelCountsConfig, count_labels
from tests.support.schemas import schema_of_parts

DOCS = REPOSITORY / "docs"
TOP_PAGES = [REPOSITORY / name for name in ("README.md", "BENCHMARKS.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP_PAGES, *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
MAX_WORDS = {"README.md": 1200, "BENCHMARKS.md": 1500}
# Keys, jobs and files of examples that a reader is to make.
EXAMPLE_JOBS = {"NAME", "label_counts"}
EXAMPLE_PATHS = {"pipelines/config/NAME.py", "pipelines/config/label_counts.py", "jobs/label_counts.py"}
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
REPOSITORY_PATH = re.compile(r"`((?:pipelines|jobs|cluster|configs|tests|benchmarks|docs)/[\w./-]*)`")
FLAG = re.compile(r"--([a-z][\w-]*(?:\.[a-z]\w*)*)")
# What stands for a value in a message of the page "Troubleshooting".
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b|(?<![\w.])\d[\d.]*(?!\w)|\.\.\.|'\w+', '\w+'")
MIN_FRAGMENT = 10


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


all_pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def load_config_reference() -> ModuleType:
    """Load the Sphinx extension that makes the page "Configuration"."""
    spec = importlib.util.spec_from_file_location("config_reference", DOCS / "_ext" / "config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_config_reference()
KEYS: dict[str, set[str]] = {job: set(leaf_fields(REFERENCE.schema_of(job))) for job in REFERENCE.job_names()}


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page: its headings as MyST and GitHub spell them, and explicit targets."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    included = re.findall(r"^```\{include\} (.*)$", text, re.MULTILINE)
    return slugs | set(re.findall(r"^\((.*)\)=$", text, re.MULTILINE)).union(
        *(anchors_of(page.parent / path) for path in included)
    )


def commands_of(text: str) -> Iterator[str]:
    """Yield the command lines of the code blocks that run a job, each in one line."""
    for block in CODE_BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if "python -m jobs." in line:
                yield line.partition(" #")[0]


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the tables in one section of a page, header and separator left out."""
    section = re.split(rf"^#+ {re.escape(heading)}$", (DOCS / page).read_text(), flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize(("name", "most"), MAX_WORDS.items())
def test_page_is_short(name: str, most: int) -> None:
    assert len((REPOSITORY / name).read_text().split()) <= most


@all_pages
def test_relative_links_resolve(page: Path) -> None:
    for found in LINK.finditer(CODE_BLOCK.sub("", page.read_text())):
        if re.match(r"https?:", found["path"]):
            continue
        target = page.parent / found["path"] if found["path"] else page
        assert target.exists(), found[0]
        if found["anchor"]:
            assert found["anchor"] in anchors_of(target), found[0]


@all_pages
def test_named_files_exist(page: Path) -> None:
    named = set(REPOSITORY_PATH.findall(page.read_text())) - EXAMPLE_PATHS - {"docs/_build"}
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


@all_pages
def test_every_key_exists_in_the_job_it_is_shown_with(page: Path) -> None:
    for command in commands_of(page.read_text()):
        job = command.partition("python -m jobs.")[2].split()[0].rstrip("`")
        if job in EXAMPLE_JOBS:
            continue
        assert job in KEYS, command
        flags = set(FLAG.findall(command.partition("python -m jobs.")[2])) - {"config", "dry-run", "help"}
        assert flags <= KEYS[job], command
        for config in re.findall(r"--config (\S+)", command):
            assert (REPOSITORY / config).exists(), command


@all_pages
def test_every_key_exists_in_some_job(page: Path) -> None:
    known = set().union(*KEYS.values()) | {"SECTION.KEY", "section.key"}
    mentioned = {flag for flag in FLAG.findall(page.read_text()) if "." in flag}
    assert sorted(mentioned - known) == []


@all_pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    mentioned = re.findall(r"`make ((?:[a-z-]+ ?)+)`", text) + re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)
    assert {target for line in mentioned for target in line.split()} <= targets


@pytest.mark.parametrize("job", REFERENCE.job_names())
def test_configuration_page_lists_every_key(job: str) -> None:
    text = REFERENCE.config_markdown(job)
    assert text.startswith(f"## {job}\n")
    rows = re.findall(r"^\| `([\w.]+)` \|.*\|$", text, re.MULTILINE)
    assert rows == list(leaf_fields(REFERENCE.schema_of(job)))
    assert "typing." not in text


def test_defaults_in_the_text_are_those_of_the_schemas() -> None:
    defaults = defaults_of(InferConfig)
    stated = [
        found
        for page in sorted(DOCS.glob("*.md"))
        for found in re.findall(r"`--([\w.]+)` \(([\d.,]+)\)", page.read_text())
    ]
    assert len(stated) >= 3
    assert {key: float(value.replace(",", "")) for key, value in stated} == {key: defaults[key] for key, _ in stated}


def test_every_error_kind_is_explained() -> None:
    assert [row[0].strip("`") for row in table_rows("label.md", "Failed images")] == list(get_args(ErrorKind))


def test_output_format_lists_every_column() -> None:
    cells = [
        name for row in table_rows("output-format.md", "part-*.parquet") for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert cells == schema_of_parts(1, 1).names
    text = (DOCS / "output-format.md").read_text()
    assert all(f"`{name}` ({field.type})" in text for name, field in zip(failed_schema().names, failed_schema()))


def test_output_format_states_the_current_formats() -> None:
    formats = {row[0].strip("`"): int(row[1]) for row in table_rows("output-format.md", "Format versions")}
    assert formats == {
        "_manifest/manifest.json": ManifestInfo.newest_format,
        "_run.json": RunRecord.newest_format,
        "_progress.json": PROGRESS_FORMAT,
        "_lock/epoch-N.json": Holder.newest_format,
        "_lock/commits-N.json": Commits.newest_format,
    }


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    code = "\n".join(path.read_text() for path in sorted((REPOSITORY / "pipelines").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code).replace("{RUN_FILE}", RUN_FILE)  # literals that Python joins
    messages = re.findall(
        r"^\| (?:failed rows of kind `\w+`: )?`([^`]+ [^`]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE
    )
    assert len(messages) >= 20
    fragments = [max(PLACEHOLDER.split(message), key=len).strip(" :;,'()") for message in messages]
    assert [fragment for fragment in fragments if len(fragment) < MIN_FRAGMENT] == []
    assert [fragment for fragment in fragments if fragment not in code] == [], "the code has no such message"


def test_example_job_counts_labels(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    rows = {
        "id": pa.array([0, 1, 2, 3], pa.int64()),
        "uri": ["a", "b", "c", "d"],
        "width": pa.array([8] * 4, pa.int32()),
        "height": pa.array([8] * 4, pa.int32()),
        "index": pa.array([[0], [1], [1], None], pa.list_(pa.int32())),
        "prob": pa.array([[0.9], [0.8], [0.2], None], pa.list_(pa.float32())),
        "label": [["cat"], ["dog"], ["dog"], None],
        "error_kind": pa.array([None, None, None, "empty"], pa.string()),
        "error_message": pa.array([None, None, None, "no bytes"], pa.string()),
        "num_retries": pa.array([0] * 4, pa.int32()),
    }
    with output.claim() as lease:
        lease.acquire()
        output.write_run({"identity": {}, "config": {}})
        commit = output.begin(lease, output.find_done(4, lease.fence.epoch))
        commit.add(commit.writer(schema_of_parts(1, 0), {})(pa.table(rows)).to_pylist()[0])
    counted = [
        count_labels(LabelCountsConfig.model_validate({"output": {"uri": output.uri}, "min_prob": min_prob}))
        for min_prob in (0, 0.5)
    ]
    assert counted == [
        {"num_counted": 3, "counts": {"dog": 2, "cat": 1}},
        {"num_counted": 2, "counts": {"cat": 1, "dog": 1}},
    ]
