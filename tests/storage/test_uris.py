"""Normalization of URIs, and refusal of outputs inside inputs."""

import os
from pathlib import Path

import pytest

from pipelines.config.infer import InferConfig
from pipelines.config.train import TrainConfig
from pipelines.errors import RequestError
from pipelines.inference.request import find_output_state
from pipelines.storage import uris
from pipelines.training.request import normalize


@pytest.mark.parametrize(
    ("uri", "normalized"),
    [
        ("FILE:///a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("file:///a/./b/../c/", "/a/c"),
        ("file://~/x", "/home/someone/x"),
        ("file://./x", os.path.abspath("x")),
        ("local:///a", "/a"),
        ("~/x", "/home/someone/x"),
        ("~", "/home/someone"),
        ("a~b", os.path.abspath("a~b")),
        ("//a//b", "/a/b"),
        ("s3a://bucket/k", "s3://bucket/k"),
        ("s3://bucket/a/../b/./c", "s3://bucket/b/c"),
        ("s3://bucket/a//b", "s3://bucket/a//b"),
        ("s3://bucket/~/x", "s3://bucket/~/x"),
        ("http://h/a/../b?q=x/../y", "http://h/b?q=x/../y"),
    ],
)
def test_equivalent_spellings_normalize_to_one_uri(uri: str, normalized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert uris.normalize(uri) == normalized


@pytest.mark.parametrize(
    ("uri", "message"),
    [("file://nas/share/x", "names the machine 'nas'"), ("s3://bucket/../x", "leads above bucket")],
)
def test_uris_outside_this_machine_or_bucket_are_refused(uri: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        uris.normalize(uri)


def test_output_inside_input_is_refused_also_through_links(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "to-out").symlink_to(tmp_path / "in" / "out")
    inputs = {"input.uri": str(tmp_path / "in")}
    for output in ("in", "in/out", "link/out", "to-out", "in-2/../in/out"):
        with pytest.raises(RequestError, match=r"output\.uri .* lies inside input\.uri"):
            uris.refuse_overlap(str(tmp_path / output), inputs)
    with pytest.raises(RequestError, match="lies inside"):
        uris.refuse_overlap(str(tmp_path / "in" / "out"), {"input.uri": f"file://{tmp_path}/link"})
    uris.refuse_overlap(str(tmp_path / "in-2"), inputs)
    with pytest.raises(RequestError, match="lies inside"):
        uris.refuse_overlap("s3://b/x/../in/out", {"input.uri": "s3a://b/in"})


def test_infer_refuses_an_output_inside_its_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    config = {"input": {"uri": f"file://{tmp_path}/in"}, "output": {"uri": f"{tmp_path}/link/out"}}
    with pytest.raises(RequestError, match=r"lies inside input\.uri"):
        find_output_state(InferConfig.model_validate(config))


def test_output_that_a_link_in_the_input_points_to_is_refused() -> None:
    with pytest.raises(RequestError, match=r"lies inside input\.uri, by the link /in/a to /b"):
        uris.refuse_linked_overlap("/b/out", "input.uri", {"/in/a": "/b"})
    uris.refuse_linked_overlap("/c/out", "input.uri", {"/in/a": "/b"})


@pytest.mark.parametrize("key", ["train", "validation"])
def test_training_refuses_an_output_inside_its_data(key: str, tmp_path: Path) -> None:
    data = {"train": {"uri": str(tmp_path / "elsewhere")}} | {key: {"uri": str(tmp_path / "data")}}
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for output in ("data/runs/first", "link/first"):
        config = TrainConfig.model_validate({"data": data, "output": {"uri": str(tmp_path / output)}})
        with pytest.raises(RequestError, match=rf"lies inside data\.{key}\.uri"):
            normalize(config)
