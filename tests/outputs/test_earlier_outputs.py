"""Outputs that an earlier version wrote are read, verified and continued.

Commit 0384be6 wrote `tests/data/outputs-of-the-previous-layout.zip`, with a manifest of format 2: 48 images (one
broken), a finished output, and one whose driver was killed after its first file.
"""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from cluster.local.object_store import ObjectStore
from cluster.local.ray_head import RayHead
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError
from pipelines.inference import verify
from pipelines.outputs import open_output
from pipelines.storage.filesystem import read_bytes, write_bytes
from tests.support.infer import REPOSITORY, infer

NUM_IMAGES = 48


@pytest.fixture(scope="module")
def outputs(store: ObjectStore) -> str:
    """URI of the folder of both outputs, in the store where their manifests say that the images are."""
    with zipfile.ZipFile(REPOSITORY / "tests/data/outputs-of-the-previous-layout.zip") as archive:
        for name in archive.namelist():
            write_bytes(f"s3://{name}", archive.read(name))
    return "s3://results"


def label_again(ray_server: RayHead, output_uri: str, **sections: Any) -> dict[str, Any]:
    """Run the command that wrote the outputs."""
    command = {
        "input": {"uri": "s3://images/old"},
        "output": {"uri": output_uri, "commit_rows": 8},
        "model": {"name": "test_resnet", "weights": "random"},
        "preprocess": {"image_size": 32},
        "failure": {"max_fraction": 1},
        "compute": {"batch_size": 8},
    }
    return infer(ray_server, **command | sections)


def test_a_finished_output_is_read_and_verified(outputs: str) -> None:
    output = open_output(f"{outputs}/finished")
    assert output.table(["id"]).num_rows == NUM_IMAGES - 1
    assert output.table(failed=True)["error_kind"].to_pylist() == ["not_an_image"]
    summary = verify.run(VerifyConfig.model_validate({"output": {"uri": output.uri}}))
    assert summary["num_sampled"] == 16


def test_the_same_command_finds_nothing_to_do(outputs: str, ray_server: RayHead) -> None:
    before = read_bytes(f"{outputs}/finished/_files.json")
    assert label_again(ray_server, f"{outputs}/finished")["num_resumed"] == NUM_IMAGES
    assert read_bytes(f"{outputs}/finished/_files.json") == before


def test_another_request_is_still_refused(outputs: str, ray_server: RayHead) -> None:
    with pytest.raises(RequestError, match=r"outputs\.topk was 5, is 3"):
        label_again(ray_server, f"{outputs}/finished", outputs={"topk": 3})


def test_an_interrupted_output_is_continued(outputs: str, ray_server: RayHead) -> None:
    interrupted = f"{outputs}/interrupted"
    num_before = open_output(interrupted).table(["id"]).num_rows
    summary = label_again(ray_server, interrupted)
    assert summary["num_resumed"] == num_before > 0
    assert open_output(interrupted).table().equals(open_output(f"{outputs}/finished").table())


def test_failed_rows_are_retried(outputs: str, ray_server: RayHead, photographs: Path) -> None:
    (broken,) = open_output(f"{outputs}/finished").table(failed=True)["uri"].to_pylist()
    write_bytes(broken, next(photographs.glob("*.jpg")).read_bytes())
    summary = label_again(ray_server, f"{outputs}/finished", failure={"max_fraction": 1, "retry": "all"})
    assert (summary["num_ok"], summary["num_failed"]) == (NUM_IMAGES, 0)
