"""`make gpu` on the CPU: every section runs, and one that fails or hangs costs no other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.context import ROW_PREFIX
from benchmarks.gpu.sections import SECTIONS
from tests.support.infer import REPOSITORY

TIMEOUT_S = 900


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_every_section_runs_on_the_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--cpu",
        "--output",
        str(tmp_path),
        "--deadline-s",
        str(TIMEOUT_S),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-4000:]
    rows = rows_of(tmp_path)
    assert [row["section"] for row in rows if row["state"] == "done"] == list(SECTIONS)
    assert all("error" not in row for row in rows)
    for section in SECTIONS.keys() - {"machine", "photographs", "tests"}:
        rates = [
            row[name] for row in rows if row["section"] == section for name in row if name.endswith("images_per_s")
        ]
        assert rates, section


@pytest.fixture
def run(tmp_path: Path) -> program.Run:
    return program.Run(tmp_path, tmp_path / "work", on_cpu=True)


def test_section_that_hangs_is_cut_off_and_keeps_its_rows(run: program.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import json, time; print({ROW_PREFIX!r} + json.dumps(dict(images_per_s=5)), flush=True); time.sleep(60)"
    run_code(code, monkeypatch)
    assert not program.run_section(run, "forward", limit_s=3)
    row, state = rows_of(run.output)
    assert row["images_per_s"] == 5
    assert state["state"] == "FAILED: cut off after 3 s"
    assert state["elapsed_s"] < 30


def test_section_that_fails_is_reported_with_its_log(run: program.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_code("raise ValueError('no such GPU')", monkeypatch)
    assert not program.run_section(run, "forward", limit_s=60)
    assert [row["state"] for row in rows_of(run.output)] == ["FAILED"]
    assert "no such GPU" in (run.output / "log.txt").read_text()


def run_code(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run code in place of the section's process."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", code], **options))


def test_nothing_is_started_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--output", str(tmp_path), "--deadline-s", "1", "--only", "forward", "decode"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    assert [row["state"] for row in rows_of(tmp_path)] == ["left out, no time"] * 2


def test_sections_fit_their_deadline() -> None:
    """The first ones, which are worth the most, fit into the deadline even if each takes its whole time."""
    limits = [
        SECTIONS[name].limit_s for name in ("machine", "photographs", "tests", "forward", "whole-fast", "whole-cuda")
    ]
    assert sum(limits) <= 460
