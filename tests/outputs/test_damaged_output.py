"""Damaged files of an output: a one-line error names the file, and no good row is deleted."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.infer import InferConfig
from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError, RunError
from pipelines.inference import run as infer_run
from pipelines.inference import verify
from pipelines.models.bundle import ModelFacts
from pipelines.models.resolve import resolve_bundle
from pipelines.outputs.writer import PartWriter
from tests.support.schemas import schema_of_predictions

NUM_INPUTS = 40
TOPK = 2
# One of every ten images fails.
FAILED_EVERY, FAILED_POSITION = 10, 3
METADATA = [
    "_run.json",
    "_files.json",
    "_progress.json",
    "_manifest/manifest.json",
    "_manifest/inputs-*.parquet",
    "_lock/epoch-*.json",
    "_lock/commits-*.json",
    "_lock.json",  # this file and the next were written by earlier versions
    "_compaction.json",
]
FILES = ["part-000000000008-*.parquet", "failed-000000000013-*.parquet"]

Change = Callable[[bytes], bytes]


def _with_fields(**fields: Any) -> Change:
    """Return a change that sets fields of a JSON object."""

    def change(content: bytes) -> bytes:
        try:
            before = json.loads(content)
        except ValueError:
            before = {}
        return json.dumps((before if isinstance(before, dict) else {}) | fields).encode()

    return change


def _with_nulls(content: bytes) -> bytes:
    try:
        return json.dumps(dict.fromkeys(json.loads(content))).encode()
    except (ValueError, TypeError):
        return b"null"


DAMAGES: dict[str, Change] = {
    "truncated": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-1],
    "empty": lambda content: b"",
    "a list": lambda content: b"[]",
    "a number": lambda content: b"5",
    "a string": lambda content: b'"text"',
    "an empty object": lambda content: b"{}",
    "deeply nested lists": lambda content: b"[" * 100_000,
    "deeply nested objects": lambda content: b'{"a":' * 100_000,
    "not UTF-8": lambda content: b"\xff\xfe\x00garbage",
    "zeros": lambda content: bytes(len(content)),
    "of a newer format": _with_fields(format=99, files=5, identity=5, owner=5, num_inputs="many"),
    "with unknown fields": _with_fields(invented_later={"a": [1]}),
    "with nulls": _with_nulls,
    "with a flipped bit at the start": lambda content: bytes([content[0] ^ 64]) + content[1:],
}


@dataclass
class ResolvedModel:
    """Stand-in for a resolved model. The runs of these tests compute nothing and need only its facts."""

    found: ModelFacts

    def facts(self) -> ModelFacts:
        return self.found

    def pickled_bundle(self) -> bytes:
        return b""


@pytest.fixture(scope="module")
def model() -> ResolvedModel:
    config = ModelConfig(name="test_resnet", weights="random")
    return ResolvedModel(resolve_bundle(config, PreprocessConfig(image_size=32)).facts())


def infer(output: Path, model: ResolvedModel) -> dict[str, Any]:
    """Run `infer` with a fake computation that writes rows without a model."""
    config = InferConfig.model_validate(
        {
            "input": {"uri": str(output.with_name("in"))},
            "output": {"uri": str(output)},
            "model": {"name": "test_resnet", "weights": "random"},
            "outputs": {"topk": TOPK, "embedding": False},
            "compute": {"batch_size": 8},
            "failure": {"max_fraction": 1.0},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer_run, "ray_session_in_background", lambda start_now: contextlib.nullcontext(lambda: None))
        patch.setattr("pipelines.engine.chain.stream", _stream)
        patch.setattr("pipelines.engine.chain.write_stage", lambda writer, num_rows, plan: _write(writer))
        return infer_run.run(config, model)  # type: ignore[arg-type]


def _stream(source: Any, *args: Any) -> Any:
    """Replace `chain.stream`: write the rows of each task, and yield the write results."""
    writer = args[-1]
    for task in range(source.num_tasks):
        yield from writer(source.rows_of(task)).to_pylist()


def _write(writer: PartWriter) -> Callable[[pa.Table], pa.Table]:
    return lambda rows: writer(_predict(rows))


def _predict(rows: pa.Table) -> pa.Table:
    is_failed = [index % FAILED_EVERY == FAILED_POSITION for index in rows["id"].to_pylist()]
    values = {
        "id": rows["id"].to_pylist(),
        "uri": rows["uri"].to_pylist(),
        "width": [1] * len(is_failed),
        "height": [1] * len(is_failed),
        "index": [[0, 1]] * len(is_failed),
        "prob": [[0.5, 0.25]] * len(is_failed),
        "label": [["a", "b"]] * len(is_failed),
        "error_kind": ["empty" if failed else None for failed in is_failed],
        "error_message": ["the object holds no bytes" if failed else None for failed in is_failed],
        "num_retries": [0] * len(is_failed),
        "is_clipped": [False] * len(is_failed),
    }
    return pa.table(values, schema=schema_of_predictions(TOPK, 0))


@pytest.fixture(scope="module")
def finished(model: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished output and return its path."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "in").mkdir()
    for index in range(NUM_INPUTS):
        (folder / "in" / f"{index:03d}.jpg").write_bytes(b"an image")
    assert infer(folder / "out", model)["num_failed"] == NUM_INPUTS // FAILED_EVERY
    return folder / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.with_name("in"), tmp_path / "in")
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    for path in output.glob("_run.json"):  # the copy has other paths
        path.write_text(path.read_text().replace(str(finished.parent), str(tmp_path)))
    manifest = output / "_manifest" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(finished.parent), str(tmp_path)))
    return output


def damage(output: Path, name: str, change: Change) -> Path:
    """Change one file and return its path. Files of earlier versions are created first."""
    older = {"_lock.json": b'{"owner": "x"}', "_compaction.json": b"[]"}
    if name in older:
        (output / name).write_bytes(older[name])
    (path,) = output.glob(name)
    path.write_bytes(change(path.read_bytes()))
    return path


def outcome(work: Callable[[], Any]) -> "str | dict[str, Any]":
    """Return a summary, or the one-line error that users see without a traceback."""
    try:
        summary: dict[str, Any] = work()
        return summary
    except (RequestError, RunError) as error:
        return str(error)


def readable_ids(output: Path) -> list[int]:
    ids: list[int] = []
    for path in [*output.glob("part-*.parquet"), *output.glob("failed-*.parquet")]:
        with contextlib.suppress(pa.ArrowException, OSError):
            ids += pq.read_table(path, columns=["id"])["id"].to_pylist()
    return sorted(ids)


def check(output: Path) -> dict[str, Any]:
    return verify.run(VerifyConfig.model_validate({"output": {"uri": str(output)}, "sample": {"num_rows": 0}}))


@pytest.mark.parametrize(
    "is_finished", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["finished", "interrupted"]
)
@pytest.mark.parametrize("name", [*METADATA, *FILES])
def test_damage_is_a_one_line_error_and_loses_no_good_row(
    output: Path, model: ResolvedModel, name: str, is_finished: bool, tmp_path: Path
) -> None:
    pristine = Path(shutil.copytree(output, tmp_path / "pristine"))
    for how, change in DAMAGES.items():
        shutil.rmtree(output)
        shutil.copytree(pristine, output)
        if not is_finished:
            (output / "_SUCCESS").unlink()
        damaged = damage(output, name, change)
        good_before = readable_ids(output)
        checked = outcome(lambda: check(output))
        first = outcome(lambda: infer(output, model))
        again = outcome(lambda: infer(output, model))
        for result in (checked, first, again):
            assert isinstance(result, dict) or ("\n" not in result and len(result) < 1000), (how, result)
        assert set(good_before) <= set(readable_ids(output)), how
        if isinstance(first, dict):
            assert isinstance(again, dict), how
            assert readable_ids(output) == list(range(NUM_INPUTS)), how
            assert (output / "_SUCCESS").exists(), how
        else:
            assert damaged.name in first, (how, first)
            assert again == first, how


def test_damaged_commit_log_deletes_nothing_outside_the_output(output: Path, model: ResolvedModel) -> None:
    victim = output.with_name("victim.txt")
    victim.write_text("x")
    (log,) = output.glob("_lock/commits-*.json")
    log.write_text(json.dumps(json.loads(log.read_text()) | {"removed": ["../victim.txt"]}))
    (output / "_SUCCESS").unlink()
    with pytest.raises(RequestError, match=r"commits-000001.json is damaged .*'\.\./victim\.txt' is not the name"):
        infer(output, model)
    assert victim.exists()


def test_missing_manifest_is_refused_if_the_output_has_rows(output: Path, model: ResolvedModel) -> None:
    (output / "_manifest" / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"no _manifest/manifest\.json, without which its ids mean nothing"):
            infer(output, model)
    assert readable_ids(output) == list(range(NUM_INPUTS))


def test_file_with_unknown_ids_is_refused_by_name(output: Path, model: ResolvedModel) -> None:
    path = next(output.glob("part-000000000008-*"))
    table = pq.read_table(path)
    others = pa.array([index + 10**6 for index in table["id"].to_pylist()])
    pq.write_table(table.set_column(0, table.schema.field("id"), others), output / "part-000001000008.parquet")
    with pytest.raises(RequestError, match=r"part-000001000008.parquet contains ids from 1000008 .* 40 inputs"):
        infer(output, model)


def test_rerun_repairs_a_finished_output(output: Path, model: ResolvedModel) -> None:
    """Duplicate rows are removed, missing rows are recomputed, and nothing else changes."""
    assert infer(output, model)["num_resumed"] == NUM_INPUTS
    files = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    copied, lost = next(output.glob("part-000000000000-*")), next(output.glob("part-000000000008-*"))
    shutil.copy(copied, output / "part-000000000001.parquet")
    lost.unlink()
    with pytest.raises(RunError, match="problems"):
        check(output)
    assert infer(output, model)["num_resumed"] == NUM_INPUTS - 7
    assert readable_ids(output) == list(range(NUM_INPUTS))
    assert check(output)["num_inputs"] == NUM_INPUTS
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert {name: files[name] for name in files if name != lost.name}.items() <= kept.items()
