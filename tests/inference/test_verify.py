"""The job `verify` on outputs that were tampered with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.ray_head import RayHead
from pipelines.config.infer import InferConfig
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError, RunError
from pipelines.inference.spot_check import spot_check
from pipelines.inference.verify import run
from pipelines.models.resolve import resolve_bundle
from pipelines.outputs import Output
from pipelines.outputs.columns import chosen_columns
from pipelines.outputs.contents import complete_digests, write_digests
from tests.support.infer import infer, run_command, summary_of


@pytest.fixture(scope="module")
def finished(
    ray_server: RayHead, photographs: Path, telling_weights: Callable[[str], Path], tmp_path_factory: Any
) -> Path:
    """Output for 16 photographs and a text file, in three files."""
    folder: Path = tmp_path_factory.mktemp("verified")
    (folder / "in").mkdir()
    for path in sorted(photographs.iterdir())[:16]:
        shutil.copy(path, folder / "in")
    (folder / "in" / "zz.jpg").write_bytes(b"no image")
    name = "ecaresnet50d_pruned"
    sections = {"model": {"name": name, "weights": str(telling_weights(name))}, "compute": {"batch_size": 8}}
    sections |= {"input": {"uri": str(folder / "in")}, "output": {"uri": str(folder / "out"), "commit_rows": 8}}
    infer(ray_server, **sections, failure={"max_fraction": 0.1})
    return folder / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def verify(output: Path, num_rows: int = 0) -> dict[str, Any]:
    return run(VerifyConfig.model_validate({"output": {"uri": str(output)}, "sample": {"num_rows": num_rows}}))


def rewrite(output: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the first file and its checksum, so that only the content reveals the change."""
    path = min(output.glob("part-*.parquet"))
    pq.write_table(change(pq.read_table(path)), path)
    (output / "_files.json").unlink()
    write_digests(str(output), complete_digests(str(output), {}))


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)


def test_good_output_passes_on_the_command_line(output: Path) -> None:
    done = run_command("jobs.verify", "--output.uri", str(output))
    assert done.returncode == 0, done.stderr
    assert "exclude" not in done.stderr
    summary = summary_of(done.stdout)
    assert (summary["num_inputs"], summary["num_ok"], summary["num_failed"]) == (17, 16, 1)
    assert 8 <= summary["num_sampled"] <= 16


@pytest.mark.parametrize("position", [0, 0.1, 0.5, 0.9, 1])
def test_flipped_bit_is_found_anywhere_in_a_file(output: Path, position: float) -> None:
    path = max(output.glob("part-*.parquet"))
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    done = run_command("jobs.verify", "--output.uri", str(output))
    assert done.returncode == 1
    assert f"{path.name}: checksum mismatch" in done.stderr
    assert "Traceback" not in done.stderr


def test_added_and_missing_files_are_found(output: Path) -> None:
    path = min(output.glob("part-*.parquet"))
    shutil.copy(path, output / "joined.parquet")
    with pytest.raises(RunError, match=r"1 problems, the first is: joined\.parquet: the run did not write this file"):
        verify(output)
    (output / "joined.parquet").rename(output / "part-000000000099.parquet")
    with pytest.raises(RunError, match=r"1 problems, the first is: part-000000000099\.parquet: the run did not write"):
        verify(output)
    path.unlink()
    with pytest.raises(RunError, match=f"3 problems, the first is: {path.name}: the file is missing"):
        verify(output)


def test_an_output_without_files_is_found(output: Path) -> None:
    for path in output.glob("*.parquet"):
        path.unlink()
    with pytest.raises(RunError, match=r"problems, the first is: .*\.parquet: the file is missing"):
        verify(output)


def broken_prob(table: pa.Table) -> pa.Table:
    values = [[np.nan, *row[1:]] for row in table["prob"].to_pylist()]
    return with_column(table, "prob", pa.array(values, pa.list_(pa.float32())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), "1 inputs have no row: ids 0"),
        (lambda table: pa.concat_tables([table, table.slice(2, 1)]), "1 inputs have more than one row: ids 2"),
        (lambda table: table.drop_columns("label"), "the columns differ from those of the run"),
        (
            lambda table: table.replace_schema_metadata({"fingerprint": "x"}),
            "the fingerprint in its metadata differs from _run.json",
        ),
        (
            lambda table: with_column(table, "uri", table["uri"].take(np.roll(np.arange(table.num_rows), 1))),
            "the values of uri differ from the manifest",
        ),
        (
            lambda table: with_column(table, "id", pa.array([*range(table.num_rows - 1), 99])),
            "some ids are not in the manifest",
        ),
        (lambda table: with_column(table, "width", pa.nulls(table.num_rows, pa.int32())), "width has nulls"),
        (broken_prob, "prob has NaN or infinite values"),
    ],
)
def test_wrong_rows_are_found_even_if_the_checksum_matches(
    output: Path, change: Callable[[pa.Table], pa.Table], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(output, change)
    with caplog.at_level("INFO", "pipelines"), pytest.raises(RunError):
        verify(output)
    assert message in caplog.text


def test_unfinished_output_is_refused(output: Path, tmp_path: Path) -> None:
    (output / "_SUCCESS").unlink()
    for folder in (output, tmp_path / "absent"):
        with pytest.raises(RequestError, match=r"is not the output of a finished jobs\.infer run"):
            verify(folder)


@pytest.mark.parametrize("name", ["_files.json", "_run.json", "_manifest/manifest.json", "_manifest/inputs-*.parquet"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"[" * 100_000, b"\xff\xfe"])
def test_damaged_record_is_reported_in_one_line(output: Path, name: str, content: bytes) -> None:
    path = next(output.glob(name))
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path} is damaged") as error:
        verify(output)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_inputs", [10, 18])
def test_a_manifest_of_another_number_of_inputs_is_damaged(output: Path, num_inputs: int) -> None:
    path = output / "_manifest" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_inputs": num_inputs}))
    with pytest.raises(RunError, match=f"{path} is damaged .num_inputs is {num_inputs}, but its files contain 17"):
        verify(output)


@pytest.mark.parametrize("name", ["_files.json", "_manifest/manifest.json"])
def test_missing_record_is_named(output: Path, name: str) -> None:
    (output / name).unlink()
    with pytest.raises(RunError, match=f"is marked as finished, but {name} is missing"):
        verify(output)


@pytest.mark.parametrize("name", ["_run.json", "_manifest/manifest.json"])
def test_record_of_a_newer_version_is_refused(output: Path, name: str) -> None:
    (output / name).write_text('{"format": 99, "identity": 5}')
    with pytest.raises(RequestError, match=f"{name} has format 99, but this version of ecaray reads formats up to"):
        verify(output)


@pytest.mark.parametrize("name", ["sub/part-000000000099.parquet", "part-000000000099.PARQUET", "a/b/copy.parquet"])
def test_extra_parquet_files_in_subfolders_are_found(output: Path, name: str) -> None:
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(min(output.glob("part-*.parquet")), output / name)
    with pytest.raises(RunError, match=f"the first is: {name}: the run did not write this file"):
        verify(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "its two fingerprints differ"),
        ({"label_names": ["x"] * 1000}, "the label_names in its metadata differs from _run.json"),
        ({"summary": {"num_inputs": 17, "num_ok": 16, "num_failed": 5, "num_files": 4}}, "num_failed is 5, but"),
        ({"transform": {"input_size": [7, 7]}}, "the transform in its metadata differs from _run.json"),
    ],
)
def test_record_that_contradicts_the_files_is_found(
    output: Path, change: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((output / "_run.json").read_text())
    (output / "_run.json").write_text(json.dumps(record | change))
    with caplog.at_level("INFO", "pipelines"), pytest.raises(RunError):
        verify(output)
    assert message in caplog.text


def test_weights_in_a_directory_need_no_model_name(output: Path, tmp_path: Path) -> None:
    """The record also contains the default name, which is not that of the directory."""
    record = json.loads((output / "_run.json").read_text())
    directory = tmp_path / "weights"
    directory.mkdir()
    shutil.copy(record["config"]["model"]["weights"], directory / "model.safetensors")
    name = record["identity"]["model.name"]
    (directory / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 1000}))
    record["config"]["model"] |= {"weights": str(directory), "name": "ecaresnet101d_pruned"}
    (output / "_run.json").write_text(json.dumps(record))
    assert verify(output, num_rows=1)["num_sampled"] == 1


def test_checksums_of_a_finished_run_are_not_recomputed(output: Path) -> None:
    path = min(output.glob("part-*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    write_digests(str(output), complete_digests(str(output), {}))
    with pytest.raises(RunError, match="checksum mismatch"):
        verify(output)


def test_checksums_cover_every_file(output: Path) -> None:
    assert json.loads((output / "_files.json").read_text()).keys() == {path.name for path in output.glob("*.parquet")}


def test_rows_with_wrong_predictions_are_found(output: Path) -> None:
    def rotated(table: pa.Table) -> pa.Table:
        order = pa.array([*range(1, table.num_rows), 0])
        for name in ("index", "prob", "label", "embedding"):
            table = with_column(table, name, table[name].take(order))
        return table

    rewrite(output, rotated)
    assert verify(output)["num_sampled"] == 0
    with pytest.raises(
        RunError, match=r"problems, the first is: recomputed row \d+ differs: the probability of class \d+ was"
    ):
        verify(output, num_rows=16)


def test_rows_decoded_on_a_gpu_are_recomputed_on_cpus(output: Path) -> None:
    record = json.loads((output / "_run.json").read_text())
    record["config"]["preprocess"]["mode"] = "cuda"
    record["config"]["compute"]["use_gpu"] = True
    config = InferConfig.model_validate(record["config"])
    record["fingerprint"] = resolve_bundle(config.model, config.preprocess).fingerprint
    manifest = Output(str(output)).find_manifest()
    assert manifest is not None
    exact = pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])
    columns = chosen_columns(config.outputs)
    assert list(spot_check(record, manifest, exact, columns)) == []
    others = with_column(exact, "embedding", exact["embedding"].take(pa.array([*range(1, exact.num_rows), 0])))
    problems = list(spot_check(record, manifest, others, columns))
    assert len(problems) > exact.num_rows / 2
    assert "the embedding differs" in problems[0]


def test_missing_or_changed_weights_are_reported(output: Path) -> None:
    record = json.loads((output / "_run.json").read_text())
    record["config"]["model"]["weights"] = "/absent.safetensors"
    (output / "_run.json").write_text(json.dumps(record))
    with pytest.raises(RequestError, match=r"absent\.safetensors.*--sample\.num_rows 0"):
        verify(output, num_rows=1)
    record["config"]["model"]["weights"] = "random"
    (output / "_run.json").write_text(json.dumps(record))
    with pytest.raises(RequestError, match="no longer those of the run"):
        verify(output, num_rows=1)
