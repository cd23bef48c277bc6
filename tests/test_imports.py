"""Imports point one way: jobs -> pipelines -> pipelines.config."""

import ast
from pathlib import Path

import pytest

from tests.support.infer import REPOSITORY

ALLOWED = {
    "pipelines": {"pipelines"},
    "jobs": {"pipelines"},
    "cluster": {"cluster", "pipelines"},
    "benchmarks": {"benchmarks", "cluster", "pipelines"},
}
OURS = set(ALLOWED) | {"tests"}


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    for path in (REPOSITORY / package).rglob("*.py"):
        ours = {name.partition(".")[0] for name in imported_modules(path)} & OURS
        assert ours <= ALLOWED[package], path


def test_config_needs_nothing_but_pydantic_and_yaml() -> None:
    for path in (REPOSITORY / "pipelines" / "config").glob("*.py"):
        for name in imported_modules(path):
            assert name.partition(".")[0] not in {"torch", "ray", "timm", "numpy", "pyarrow", "fsspec"}, path
            assert not name.startswith("pipelines.") or name.startswith(("pipelines.config", "pipelines.errors")), path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_jobs_are_scripts_of_at_most_40_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
