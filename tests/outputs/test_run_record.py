"""Run records, and the refusal of runs with different settings."""

import logging
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.infer import InferConfig
from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform
from pipelines.inference.request import identify
from pipelines.models.bundle import ModelFacts
from pipelines.outputs import run_record


def test_output_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    output = str(tmp_path)
    run_record.refuse_if_changed(output, None)
    run_record.write_run(output, {"identity": {"fingerprint": "a"}})
    record = run_record.find_run(output)
    run_record.refuse_if_changed(output, record)
    for before in (None, {"identity": {"fingerprint": "b"}}):
        with pytest.raises(RequestError, match=r"another run changed .* while this one was starting"):
            run_record.refuse_if_changed(output, before)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"input": {"max_bytes": 5}}, r"input\.max_bytes was 268435456, is 5"),
        ({"preprocess": {"max_pixels": 5}}, r"preprocess\.max_pixels was 178956970, is 5"),
        ({"outputs": {"embedding": False}}, r"outputs\.embedding was True, is False"),
    ],
)
def test_identity_includes_keys_that_change_rows(change: dict[str, Any], key: str) -> None:
    before, after = _infer_identity({}), _infer_identity(change)
    with pytest.raises(RequestError, match=key):
        run_record.refuse_other_run("out", {"identity": before}, after, InferConfig)
    # Older versions had fewer keys in the identity, but all keys in the config.
    config = InferConfig.model_validate(SECTIONS).model_dump(mode="json")
    with pytest.raises(RequestError, match=key):
        run_record.refuse_other_run("out", {"identity": {"outputs.topk": 5}, "config": config}, after, InferConfig)


@pytest.mark.parametrize(
    "change",
    [
        {"compute": {"batch_size": 8}},
        {"output": {"uri": "out", "commit_rows": 5}},
        {"failure": {"max_fraction": 1}},
        {"model": {"weights": "elsewhere.safetensors"}},  # its content is in the fingerprint
    ],
)
def test_identity_excludes_keys_that_change_no_row(change: dict[str, Any]) -> None:
    assert _infer_identity({}) == _infer_identity(change)


def test_identity_includes_label_names_for_older_outputs_too() -> None:
    with pytest.raises(RequestError, match="label_names_sha256 was"):
        run_record.refuse_other_run(
            "out", {"identity": _infer_identity({})}, _infer_identity({}, ("x", "y")), InferConfig
        )
    older = {"identity": {"model.name": "test_resnet", "outputs.topk": 2}, "label_names": ["cat", "dog"]}
    run_record.refuse_other_run("out", older, _infer_identity({}), InferConfig)
    with pytest.raises(RequestError, match="label_names_sha256 was"):
        run_record.refuse_other_run("out", older, _infer_identity({}, ("x", "y")), InferConfig)


def test_keys_that_an_earlier_version_did_not_know_have_their_default() -> None:
    known = {key: value for key, value in _infer_identity({}).items() if not key.startswith("outputs.")}
    earlier = {"identity": known | {"outputs.topk": 2}}
    run_record.refuse_other_run("out", earlier, _infer_identity({}), InferConfig)
    with pytest.raises(RequestError, match=r"outputs\.embedding was True, is False"):
        run_record.refuse_other_run("out", earlier, _infer_identity({"outputs": {"embedding": False}}), InferConfig)
    with_entropy = _infer_identity({}) | {"outputs.registered_columns": ["entropy"]}
    with pytest.raises(RequestError, match=r"outputs\.registered_columns was \[\], is \['entropy'\]"):
        run_record.refuse_other_run("out", earlier, with_entropy, InferConfig)


def test_keys_of_earlier_versions_are_compared_under_their_new_names() -> None:
    found = {"identity": {"optim.precision": "bfloat16", "optim.compile": False}}
    run_record.refuse_other_run("out", found, {"model.dtype": "bfloat16"}, InferConfig)
    with pytest.raises(RequestError, match=r"model\.dtype was 'bfloat16', is 'float32'"):
        run_record.refuse_other_run("out", found, {"model.dtype": "float32"}, InferConfig)


SECTIONS: dict[str, Any] = {"input": {"uri": "in"}, "output": {"uri": "out"}}


def _infer_identity(change: dict[str, Any], label_names: tuple[str, ...] = ("cat", "dog")) -> dict[str, Any]:
    sections = {name: SECTIONS.get(name, {}) | change.get(name, {}) for name in SECTIONS | change}
    transform = EvalTransform((32, 32), 0.875, "center", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    facts = ModelFacts("test_resnet", 2, 8, label_names, label_names, transform, "float32", "f" * 64)
    config = InferConfig.model_validate(sections)
    return identify(config, facts, config.outputs.model_copy(update={"topk": 2}), sampled_ids=None)


def test_differences_are_logged_as_a_table_and_raised_as_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = {"identity": {"model.name": "a", "topk": 5}}
    run_record.refuse_other_run("out", found, {"model.name": "a", "topk": 5}, InferConfig)
    assert not caplog.messages
    with pytest.raises(RequestError, match="topk was 5, is 3"):
        run_record.refuse_other_run("out", found, {"model.name": "a", "topk": 3}, InferConfig)
    assert [line.split() for line in caplog.messages[0].splitlines()] == [["was", "is"], ["topk", "5", "3"]]
