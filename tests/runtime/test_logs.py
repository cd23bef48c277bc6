"""Output of a job and its Ray, on terminals and in log files."""

import io
import os
import subprocess
import sys

import pytest

from pipelines.config.text import escape_controls
from pipelines.runtime.logs import CLEAR_LINE, SafeStream
from pipelines.runtime.progress import Progress
from tests.support.infer import REPOSITORY

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\x9bc\u202egpj.exe\rd\x08\x7f"
ESCAPED = r"a\x1b]0;owned\x07\x1b[2Jb\x9bc\u202egpj.exe\rd\x08\x7f"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(text: str, stream: io.StringIO) -> str:
    print(text, file=SafeStream(stream), flush=True)
    return stream.getvalue()


def test_control_characters_are_escaped() -> None:
    assert escape_controls(HOSTILE, keep="\n\t") == ESCAPED
    assert escape_controls("caf\u00e9 \U0001f408\tand\nmore", keep="\n\t") == "caf\u00e9 \U0001f408\tand\nmore"
    assert escape_controls("\udcff.jpg") == r"\udcff.jpg"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_streams_escape_hostile_file_names(stream: type[io.StringIO]) -> None:
    assert printed(HOSTILE, stream()) == f"{ESCAPED}\n"
    assert printed(f"{CLEAR_LINE}{HOSTILE}", io.StringIO()) == rf"\x1b[2K\r{ESCAPED}" + "\n"


def test_progress_updates_its_line_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", SafeStream(terminal))
    with Progress(3) as progress:
        progress._print(end="\r")
    assert terminal.getvalue().startswith(f"{CLEAR_LINE}0 of 3 images")
    assert "\r" + CLEAR_LINE in terminal.getvalue()


def test_log_files_have_no_worker_prefixes_or_colours() -> None:
    assert printed("(RayTrainWorker pid=71, ip=10.0.0.7) epoch 1", io.StringIO()) == "epoch 1\n"
    assert printed("(MapBatches(PartWriter) pid=71) late", io.StringIO()) == "late\n"
    assert printed("(RayTrainWorker pid=71) epoch 1", Terminal()) == "(RayTrainWorker pid=71) epoch 1\n"
    assert printed("late\x1b[32m [repeated 2x across cluster]\x1b[0m", io.StringIO()) == (
        "late [repeated 2x across cluster]\n"
    )


JOB = """
import os, subprocess, sys
from pipelines.config.verify import VerifyConfig
from pipelines.runtime.job import main

def run(config):
    for number in range(3):
        print("line", number, file=sys.stderr, flush=True)
    os.write(2, b"[E] core_worker.cc:1: an actor has constructor arguments in the object store and max_restarts > 0\\n")
    os.write(2, b"[E] task_manager.cc:3: Failed to push error to driver for task d6fea90c\\n")
    os.write(2, b"[E] core_worker.cc:2: the raylet died \\x1b[31m\\n")
    os.write(2, b"no newline at the end")
    with open(os.environ["DONE"], "w") as file:
        assert file.fileno() > 2  # the file must not reuse a closed standard descriptor
    return {"num": 1}

main("a job", VerifyConfig, run)
"""


def run_job(redirection: str, done: str) -> "subprocess.CompletedProcess[str]":
    shell = f'"$0" -c "$1" --output.uri /absent {redirection}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell, sys.executable, JOB],
        cwd=REPOSITORY,
        env=os.environ | {"DONE": done},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("redirection", "stdout"),
    [
        ("", '{"num": 1}\n'),
        ("| true", ""),
        (">&-", ""),
        ("2>&-", '{"num": 1}\n'),
        ("<&- >&- 2>&-", ""),
        (">/dev/full 2>/dev/full", ""),
        ("2>&1 >/dev/null | head -1", "line 0\n"),
    ],
)
def test_run_succeeds_if_its_output_cannot_be_written(
    redirection: str, stdout: str, tmp_path: os.PathLike[str]
) -> None:
    done = run_job(redirection, os.path.join(tmp_path, "done"))
    assert (done.returncode, done.stdout) == (0, stdout), done.stderr
    assert os.path.exists(os.path.join(tmp_path, "done"))
    assert "Traceback" not in done.stderr


def test_only_the_noise_of_rays_core_is_dropped(tmp_path: os.PathLike[str]) -> None:
    lines = run_job("", os.path.join(tmp_path, "done")).stderr.splitlines()
    assert sorted(lines) == [
        r"[E] core_worker.cc:2: the raylet died \x1b[31m",
        "line 0",
        "line 1",
        "line 2",
        "no newline at the end",
    ]
