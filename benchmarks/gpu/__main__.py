"""Run every measurement that needs a GPU, in one command with a deadline.

    python -m benchmarks.gpu [--output gpu-results] [--deadline-s 460] [--only forward replica] [--cpu]

Each section of `benchmarks.gpu.sections` runs in a separate process with a time limit. Its rows are written as they
come, so a section that fails, hangs or is cut off costs no other. The most important sections come first. Those for
which no time is left are named as left out. The output holds `rows.jsonl`, `table.md` and `log.txt`.

`--cpu` runs the same code on the CPU, with few images and one model, to test this program on machines without a GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROW_PREFIX
from benchmarks.gpu.sections import SECTIONS

# Less time than this is not enough for any measurement.
MIN_SECTION_S = 15.0
# The limits of the sections are those on a GPU.
CPU_LIMIT_FACTOR = 3


@dataclass(frozen=True)
class Run:
    """One run of this program.

    Attributes:
        output: Folder of the results.
        work: Folder of photographs and weights, which later runs use again.
        on_cpu: True to run on the CPU.
    """

    output: Path
    work: Path
    on_cpu: bool

    def keep(self, section: str, elapsed_s: float, state: str, cells: dict[str, Any] | None = None) -> None:
        """Write a row of results, or the state of a section."""
        row = {"section": section, "elapsed_s": round(elapsed_s, 1), "state": state, **(cells or {})}
        with open(self.output / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        text = ", ".join(f"{name} {value}" for name, value in (cells or {}).items())
        line = f"| {section} | {elapsed_s:.0f} s | {state if not cells else text} |"
        with open(self.output / "table.md", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    """Run the sections one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--deadline-s", type=float, default=460.0, help="seconds after which nothing more is started")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with few images")
    args = parser.parse_args()
    started = time.monotonic()
    run = Run(args.output.resolve(), (args.output / "work").resolve(), args.cpu)
    run.work.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "table.md", "log.txt"):
        (run.output / name).unlink(missing_ok=True)
    num_failed = 0
    for section in args.only:
        left_s = args.deadline_s - (time.monotonic() - started)
        if left_s < MIN_SECTION_S:
            run.keep(section, 0, "left out, no time")
            continue
        limit_s = SECTIONS[section].limit_s * (CPU_LIMIT_FACTOR if args.cpu else 1)
        num_failed += not run_section(run, section, min(limit_s, left_s))
    shutil.rmtree(run.work / "rows", ignore_errors=True)
    print(f"{num_failed} of {len(args.only)} sections failed; results are in {run.output}")
    sys.exit(1 if num_failed else 0)


def run_section(run: Run, section: str, limit_s: float) -> bool:
    """Run a section in a separate process group, and return True if it succeeded within its limit."""
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.sections",
        section,
        str(run.work),
        *(["--cpu"] if run.on_cpu else []),
    ]
    with open(run.output / "log.txt", "a") as log:
        log.write(f"\n===== {section}, at most {limit_s:.0f} s\n")
        log.flush()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        timer = threading.Timer(limit_s, kill_group, [process.pid])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith(ROW_PREFIX):
                run.keep(section, time.monotonic() - started, "", json.loads(line.removeprefix(ROW_PREFIX)))
        status = process.wait()
        timer.cancel()
    kill_group(process.pid)  # processes that it left running
    elapsed_s = time.monotonic() - started
    state = "done" if status == 0 else f"FAILED: cut off after {limit_s:.0f} s" if elapsed_s >= limit_s else "FAILED"
    run.keep(section, elapsed_s, state)
    return status == 0


def kill_group(process_group: int) -> None:
    """Kill all processes of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)


if __name__ == "__main__":
    main()
