"""Broken and hostile files: each is decoded or fails with a reason, and none exhausts the memory."""

import subprocess
import sys
from typing import get_args

import pytest
from PIL import Image

from pipelines.errors import ErrorKind, ItemError
from pipelines.images.decode import decode_rgb
from tests.support.broken import broken_files, strange_files
from tests.support.infer import REPOSITORY

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0


def test_there_are_at_least_60_broken_files_with_known_error_kinds() -> None:
    assert len(broken_files()) >= 60
    assert {kind for _, kinds in broken_files().values() for kind in kinds} <= set(get_args(ErrorKind))


@pytest.mark.parametrize("name", [name for name, (content, _) in broken_files().items() if content])
def test_broken_file_fails_with_a_reason(name: str) -> None:
    content, kinds = broken_files()[name]
    with pytest.raises(ItemError) as caught:
        decode_rgb(content, MAX_PIXELS)
    assert caught.value.kind in kinds
    assert caught.value.message == " ".join(caught.value.message.split())


@pytest.mark.parametrize("name", strange_files())
def test_strange_file_is_decoded(name: str) -> None:
    assert decode_rgb(strange_files()[name], MAX_PIXELS).mode == "RGB"


def test_no_file_exhausts_the_memory() -> None:
    code = """
import resource
from contextlib import suppress
from pipelines.errors import ItemError
from pipelines.images.decode import decode_rgb
from tests.support.broken import broken_files, strange_files
files = [content for content, _ in broken_files().values()] + list(strange_files().values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for content in files:
    with suppress(ItemError):
        decode_rgb(content, 178_956_970)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # KiB, in addition to the memory for creating the files
