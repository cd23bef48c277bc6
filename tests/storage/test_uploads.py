"""Cleanup of unfinished multipart uploads and local files."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local.object_store import ObjectStore
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.uploads import abort_unfinished_uploads
from tests.support.infer import REPOSITORY


@pytest.fixture
def keys(store: ObjectStore, tmp_path: Path) -> dict[str, str]:
    """Begin uploads inside and beside an output, and return their keys."""
    filesystem, _ = open_filesystem("s3://scratch")
    name = tmp_path.name
    keys = {
        "inside": f"{name}/out/part-1.parquet",
        "deeper": f"{name}/out/a/b",
        "beside": f"{name}/out-2/part-1.parquet",
    }
    for key in keys.values():
        upload = filesystem.call_s3("create_multipart_upload", Bucket="scratch", Key=key)
        part = {"UploadId": upload["UploadId"], "PartNumber": 1, "Body": b"x" * 1000}
        filesystem.call_s3("upload_part", Bucket="scratch", Key=key, **part)
    return keys


def unfinished(prefix: str) -> set[str]:
    filesystem, _ = open_filesystem("s3://scratch")
    found = filesystem.call_s3("list_multipart_uploads", Bucket="scratch", Prefix=prefix)
    return {upload["Key"] for upload in found.get("Uploads", [])}


def test_only_uploads_below_the_output_are_aborted(keys: dict[str, str], tmp_path: Path) -> None:
    assert unfinished(tmp_path.name) == set(keys.values())
    assert abort_unfinished_uploads(f"s3://scratch/{tmp_path.name}/out") == 2
    assert unfinished(tmp_path.name) == {keys["beside"]}


def test_store_that_denies_the_calls_causes_a_warning(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    assert abort_unfinished_uploads("s3://no-such-bucket/out") == 0
    assert "could not be aborted" in caplog.text


WRITE = """
import os, sys
from pipelines.storage.filesystem import write_bytes
write_bytes(sys.argv[1], b"x", check=lambda: os._exit(9))
"""


def test_unfinished_files_of_a_killed_process_are_removed_and_no_others(tmp_path: Path) -> None:
    others = {".DS_Store", ".hidden.parquet", "part-1.parquet"}
    for name in others:
        (tmp_path / name).touch()
    killed = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "part-2.parquet")], cwd=REPOSITORY)
    assert killed.returncode == 9
    assert len(list(tmp_path.iterdir())) == 4
    assert abort_unfinished_uploads(str(tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} == others
