"""What the CPUs of this machine can do."""

import functools
import os
import shutil
from pathlib import Path

VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The kernel's names of the CPU's features; empty where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.partition(":")[2].split())


def cxx() -> str | None:
    """The C++ compiler of this machine: `CXX` of the environment, or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def why_no_int8() -> str | None:
    """What this machine lacks for models in int8; None where it lacks nothing."""
    if not cpu_flags() & VNNI_FLAGS:
        return "its CPU has no VNNI, without which int8 is neither faster nor safe from overflow"
    if not cxx():
        return "it has no C++ compiler (g++) to compile the model with"
    return None
