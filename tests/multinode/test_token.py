"""Access token: clients without it are rejected, and no log contains it."""

import subprocess
from pathlib import Path

import pytest

from tests.multinode.conftest import Site
from tests.multinode.ray_cluster import RAY, TOKEN_FILE
from tests.support.infer import REPOSITORY

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]


def test_client_without_the_token_is_rejected(site: Site, tmp_path: Path) -> None:
    for mode in ("token", "disabled"):
        variables = site.cluster.client_variables() | {"HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
        if mode == "token":
            variables["RAY_AUTH_TOKEN"] = "not the token"
        command = [RAY, "job", "submit", "--", "python", "-c", "print('it ran')"]
        done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "it ran" not in done.stdout + done.stderr
        assert "uthentication" in done.stdout + done.stderr


def test_no_log_contains_the_token_or_the_secret_key(site: Site) -> None:
    printed = site.cluster.run_job("jobs.models", "--names", "ecaresnetlight", submission_id="models")
    assert printed["models"][0]["name"] == "ecaresnetlight"
    token = (site.cluster.head.home / TOKEN_FILE).read_text().strip()
    secrets = [secret.encode() for secret in (token, site.environment["AWS_SECRET_ACCESS_KEY"])]
    logs = [path for path in site.cluster.head.home.parent.parent.glob("*/ray/**/logs/**/*") if path.is_file()]
    logs += list(site.cluster.logs.iterdir())
    assert len(logs) > 20
    assert not [path for path in logs for secret in secrets if secret in path.read_bytes()]
