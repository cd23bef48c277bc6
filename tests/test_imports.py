"""Imports point one way, from the jobs down to the config."""

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
# Rooms of `pipelines`, lowest first. A room imports from rooms of lower lines only, and from itself.
LAYERS = (
    {"errors"},
    {"config"},
    {"runtime"},
    {"storage"},
    {"inputs", "images", "models"},
    {"engine", "outputs"},
    {"inference", "training", "downstream", "benchmark"},
)
# Within a layer.
NEIGHBOURS = {("models", "images"), ("downstream", "inference"), ("benchmark", "inference"), ("engine", "outputs")}


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "pipelines" else {node.module}
    return found


def private_ray_names(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if name.startswith("ray.") and "._" in name}


def layer_of(room: str) -> int:
    return next(layer for layer, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    for path in (REPOSITORY / package).rglob("*.py"):
        ours = {name.partition(".")[0] for name in imported_modules(path)} & OURS
        assert ours <= ALLOWED[package], path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines").rglob("*.py")), ids=lambda path: path.stem)
def test_rooms_import_only_from_rooms_below_them(path: Path) -> None:
    room = path.relative_to(REPOSITORY / "pipelines").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in imported_modules(path):
        if name.startswith("pipelines."):
            other = name.split(".")[1]
            is_below = layer_of(other) < layer_of(room)
            assert is_below or other == room or (room, other) in NEIGHBOURS, f"{path} imports {name}"


def test_private_ray_names_are_used_in_ray_compat_only() -> None:
    users = {path.name for path in (REPOSITORY / "pipelines").rglob("*.py") if private_ray_names(path)}
    assert users == {"ray_compat.py"}


def test_no_module_lies_beside_the_rooms() -> None:
    loose = {path.name for path in (REPOSITORY / "pipelines").glob("*.py")}
    assert loose == {"__init__.py", "errors.py"}


def test_config_needs_nothing_but_pydantic_and_yaml() -> None:
    for path in (REPOSITORY / "pipelines" / "config").glob("*.py"):
        for name in imported_modules(path):
            assert name.partition(".")[0] not in {"torch", "ray", "timm", "numpy", "pyarrow", "fsspec"}, path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_jobs_are_scripts_of_at_most_40_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
