"""Capabilities of this machine's CPUs."""

import functools
import os
import shutil
from pathlib import Path

VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU features listed in /proc/cpuinfo, or an empty set if the kernel lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.partition(":")[2].split())


def cxx() -> str | None:
    """Return the path of the C++ compiler (`CXX`, or g++ by default), or None if it is not installed."""
    return shutil.which(os.environ.get("CXX", "g++"))


def why_no_int8() -> str | None:
    """Return the reason why this machine cannot run int8 models, or None if it can."""
    if not cpu_flags() & VNNI_FLAGS:
        return "its CPU lacks VNNI instructions, without which int8 is no faster and can overflow"
    if not cxx():
        return "it has no C++ compiler to compile the model; install g++ or set CXX"
    return None
