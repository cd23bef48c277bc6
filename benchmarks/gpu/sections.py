"""Sections of `benchmarks.gpu`, each of which runs in a separate process and prints its rows as JSON.

python -m benchmarks.gpu.sections SECTION WORK_FOLDER [--cpu]
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.context import Context
from benchmarks.gpu.inference import measure_decode, measure_forward, measure_replica, measure_whole
from benchmarks.gpu.machine import describe_machine, run_tests, write_photographs
from benchmarks.gpu.training import measure_training, measure_training_steps


@dataclass(frozen=True)
class Section:
    """Measurement with its time limit on a GPU.

    Attributes:
        measure: Function that prints the rows.
        limit_s: Seconds after which it is killed.
    """

    measure: Callable[[Context], None]
    limit_s: float


# The most important ones first.
SECTIONS = {
    "machine": Section(describe_machine, 40),
    "photographs": Section(write_photographs, 40),
    "tests": Section(run_tests, 150),
    "forward": Section(measure_forward, 90),
    "whole-fast": Section(functools.partial(measure_whole, mode="fast"), 60),
    "whole-cuda": Section(functools.partial(measure_whole, mode="cuda"), 60),
    "decode": Section(measure_decode, 40),
    "replica": Section(measure_replica, 50),
    "training-steps": Section(measure_training_steps, 100),
    "whole-fast-compiled": Section(functools.partial(measure_whole, mode="fast", compile=True), 75),
    "training": Section(measure_training, 90),
    "whole-exact": Section(functools.partial(measure_whole, mode="exact"), 60),
}


def main() -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("work", type=Path)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    SECTIONS[args.section].measure(Context(args.work, args.cpu))


if __name__ == "__main__":
    main()
