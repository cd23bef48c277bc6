"""What the tests share: one object store, one Ray, photographs of every kind, and weights that tell them apart."""

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
# Fixtures that start services, and markers of what takes long or starts some itself.
SERVICES = {"store", "ray_server"}
NOT_UNIT = ("integration", "slow", "gpu", "multinode")
# Modules that start a Ray or whole jobs of their own, or run and compile whole models, most of them for many seconds.
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
    """Mark as `unit` each test that starts neither Ray nor a store nor a whole job."""
    for item in items:
        if not (_uses_services(item) or any(item.get_closest_marker(name) for name in NOT_UNIT)):
            item.add_marker("unit")


def _uses_services(item: pytest.Item) -> bool:
    # Tests for each kind of store are parametrized by its name, and ask for the fixture while they run.
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    module = item.path.relative_to(REPOSITORY / "tests").as_posix()
    return bool(SERVICES & set(getattr(item, "fixturenames", ()))) or "s3" in parameters or module in NOT_UNIT_MODULES


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the status for the end of the process."""
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process as `pipelines.runtime.job.main` ends a job's: without the interpreter's teardown.

    Threads of Ray, Arrow and obstore outlive the tests, and one that wakes while modules are being torn down
    can end a run whose tests all passed with a segmentation fault.
    """
    if EXIT_STATUS in config.stash and not hasattr(config, "workerinput"):  # pytest-xdist ends its workers itself
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A HOME of the tests' own: Ray writes its access token there, and no developer's AWS profile is read."""
    home = tmp_path_factory.mktemp("home")
    names = ("HOME", "RAY_ADDRESS", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HF_HOME")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["HOME"] = str(home)
    yield home
    os.environ.update({name: value for name, value in before.items() if value is not None})


@pytest.fixture(scope="session")
def store(own_home: Path) -> Iterator[ObjectStore]:
    """A running object store; the standard variables lead to it."""
    with object_store(BUCKETS) as running:
        os.environ.update(running.environment())
        yield running
        for name in running.environment():
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def ray_server(store: ObjectStore) -> Iterator[RayHead]:
    """A running Ray head with its job server, whose workers reach the store and import this repository."""
    with ray_head(2, store.environment() | {"PYTHONPATH": str(REPOSITORY)}) as running:
        yield running


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `NUM_PHOTOGRAPHS` photographs, of all file formats and pixel modes in turn."""
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, NUM_PHOTOGRAPHS)
    return folder


@pytest.fixture(scope="session")
def telling_weights(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Callable[[str], Path]:
    """Model name to a `.safetensors` file of weights that give most photographs a top-1 of their own."""
    from tests.support.weights import save_telling_weights

    folder = tmp_path_factory.mktemp("weights")

    def saved(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_telling_weights(name, photographs, path)
        return path

    return saved
