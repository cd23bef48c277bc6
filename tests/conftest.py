"""Shared fixtures: one object store, one Ray head, photographs of every kind, and weights that distinguish them."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.local.object_store import ObjectStore, object_store
from cluster.local.ray_head import RayHead, ray_head
from tests.support.photographs import write_photographs

REPOSITORY = Path(__file__).parents[1]
NUM_PHOTOGRAPHS = 66
BUCKETS = ("images", "results", "scratch")
# Fixtures that start services, and markers of tests that are slow or start services themselves.
SERVICES = {"store", "ray_server"}
NOT_UNIT = ("integration", "slow", "gpu", "multinode")
# Modules that start Ray or whole jobs themselves, or run and compile whole models. Most take many seconds.
NOT_UNIT_MODULES = {
    "benchmark/test_stages.py",
    "jobs/test_benchmark_command.py",
    "jobs/test_infer_command.py",
    "engine/test_autoscaling.py",
    "outputs/test_damaged_output.py",
    "engine/test_declared_gpus.py",
    "engine/test_stages.py",
    "models/cpu/test_int8.py",
    "models/test_prepare.py",
    "models/test_process.py",
    "models/cpu/test_rounding.py",
    "models/cpu/test_winograd.py",
    "training/test_learner.py",
    "training/test_run.py",
}
EXIT_STATUS = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start neither Ray nor a store nor a whole job as `unit`, and those on a Ray head as `ray`."""
    for item in items:
        if "ray_server" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        if not (_uses_services(item) or any(item.get_closest_marker(name) for name in NOT_UNIT)):
            item.add_marker("unit")


def _uses_services(item: pytest.Item) -> bool:
    # Tests for several kinds of stores are parametrized by kind, and request the fixture while they run.
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    module = item.path.relative_to(REPOSITORY / "tests").as_posix()
    uses_store = any(isinstance(value, str) and value.split(" ")[0] == "s3" for value in parameters)
    return uses_store or bool(SERVICES & set(getattr(item, "fixturenames", ()))) or module in NOT_UNIT_MODULES


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Save the exit status for the end of the process."""
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Exit the process without the interpreter's teardown, as `pipelines.runtime.job.main` does.

    Threads of Ray, Arrow and obstore outlive the tests. If one wakes up while modules are torn down, a run whose tests
    all passed can end with a segmentation fault.
    """
    ends_by_itself = hasattr(config, "workerinput") or "mutmut" in sys.modules  # a process of pytest-xdist or mutmut
    if EXIT_STATUS in config.stash and not ends_by_itself:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Separate HOME for the tests, where Ray writes its access token. No AWS profile of the developer is read."""
    home = tmp_path_factory.mktemp("home")
    names = ("HOME", "RAY_ADDRESS", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HF_HOME")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["HOME"] = str(home)
    yield home
    os.environ.update({name: value for name, value in before.items() if value is not None})


@pytest.fixture(scope="session")
def store(own_home: Path) -> Iterator[ObjectStore]:
    """Running object store. The standard AWS variables are set to reach it."""
    with object_store(BUCKETS) as running:
        os.environ.update(running.environment())
        yield running
        for name in running.environment():
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def ray_server(store: ObjectStore) -> Iterator[RayHead]:
    """Running Ray head with a job server. Its workers reach the store and import this repository."""
    with ray_head(2, store.environment() | {"PYTHONPATH": str(REPOSITORY)}) as running:
        yield running


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `NUM_PHOTOGRAPHS` photographs, in all file formats and pixel modes in turn."""
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, NUM_PHOTOGRAPHS)
    return folder


@pytest.fixture(scope="session")
def telling_weights(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Callable[[str], Path]:
    """Function from a model name to a `.safetensors` file of weights that give most photographs a different top-1."""
    from tests.support.weights import save_telling_weights

    folder = tmp_path_factory.mktemp("weights")

    def saved(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_telling_weights(name, photographs, path)
        return path

    return saved
