"""Direction of imports, from the jobs down to the config."""

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
# Packages of `pipelines`, lowest layer first. A package imports only from lower layers and from itself.
LAYERS = (
    {"errors"},
    {"config"},
    {"runtime"},
    {"storage"},
    {"inputs", "images", "models"},
    {"engine", "outputs"},
    {"inference", "training", "downstream", "benchmark"},
)
# Allowed imports within a layer.
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


def layer_of(package: str) -> int:
    return next(layer for layer, packages in enumerate(LAYERS) if package in packages)


@pytest.mark.parametrize("package", ALLOWED)
def test_top_level_packages_import_only_from_allowed_packages(package: str) -> None:
    for path in (REPOSITORY / package).rglob("*.py"):
        ours = {name.partition(".")[0] for name in imported_modules(path)} & OURS
        assert ours <= ALLOWED[package], path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines").rglob("*.py")), ids=lambda path: path.stem)
def test_packages_import_only_from_lower_layers(path: Path) -> None:
    package = path.relative_to(REPOSITORY / "pipelines").parts[0].removesuffix(".py")
    if package == "__init__":
        return
    for name in imported_modules(path):
        if name.startswith("pipelines."):
            other = name.split(".")[1]
            is_below = layer_of(other) < layer_of(package)
            assert is_below or other == package or (package, other) in NEIGHBOURS, f"{path} imports {name}"


def test_only_ray_compat_uses_private_ray_names() -> None:
    users = {path.name for path in (REPOSITORY / "pipelines").rglob("*.py") if private_ray_names(path)}
    assert users == {"ray_compat.py"}


def test_every_module_is_in_a_package_except_errors() -> None:
    modules = {path.name for path in (REPOSITORY / "pipelines").glob("*.py")}
    assert modules == {"__init__.py", "errors.py"}


def test_config_imports_no_heavy_packages() -> None:
    for path in (REPOSITORY / "pipelines" / "config").glob("*.py"):
        for name in imported_modules(path):
            assert name.partition(".")[0] not in {"torch", "ray", "timm", "numpy", "pyarrow", "fsspec"}, path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_jobs_have_at_most_40_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
