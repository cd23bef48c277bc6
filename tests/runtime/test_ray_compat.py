"""The Ray version that `ray_compat` was checked against."""

from pipelines.runtime.ray_compat import CHECKED_RAY_VERSION
from tests.support.infer import REPOSITORY


def test_checked_version_is_the_locked_version() -> None:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    assert f"ray=={CHECKED_RAY_VERSION}" in [line.partition(" ")[0] for line in lines]
