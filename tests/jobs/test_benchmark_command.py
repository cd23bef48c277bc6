"""`jobs.benchmark` run by its command line."""

import json
from pathlib import Path

import pytest

from tests.support.infer import run_command, summary_of

STAGES = ["fetch", "decode", "forward", "write"]


def arguments(photographs: Path, output: Path) -> list[str]:
    model = ["--model.name", "test_resnet", "--model.weights", "random"]
    return ["--input.uri", str(photographs), "--output.uri", str(output), *model, "--sample.stage_s", "0.5"]


@pytest.mark.slow
def test_benchmark_prints_a_table_and_leaves_only_its_figures(photographs: Path, tmp_path: Path) -> None:
    done = run_command("jobs.benchmark", *arguments(photographs, tmp_path / "out"), timeout_s=150)
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert list(summary["stages"]) == STAGES
    assert summary["num_images"] == len(list(photographs.iterdir()))
    assert summary["images_per_s"] > 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == STAGES
    (left,) = (tmp_path / "out").iterdir()
    assert json.loads(left.read_text()) == summary


def test_non_empty_output_is_refused(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run_command("jobs.benchmark", *arguments(photographs, tmp_path), timeout_s=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"jobs.benchmark: error: {tmp_path} is not empty")
    assert (tmp_path / "mine.txt").read_text() == "mine"
