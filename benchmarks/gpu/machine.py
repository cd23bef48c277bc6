"""Machine of `benchmarks.gpu`: device, driver and versions, its photographs, and the tests that need a GPU."""

import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.context import Context, print_row, seconds_per_call, spawned_processes

PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow")
# Numbers of nvjpegBackend_t. `nvjpegCreateEx` fails if the GPU has no such engine.
NVJPEG_BACKENDS = {"hardware": 3, "default": 0}


def describe_machine(context: Context) -> None:
    """Print device, driver, versions, and the rates of matrix products and copies."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    shm = os.statvfs("/dev/shm")
    print_row(gpu=_output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    print_row(
        cpu=re.findall(r"Model name:\s*(.*)", _output_of("lscpu")),
        num_cpus=len(os.sched_getaffinity(0)),
        shm_gb=round(shm.f_blocks * shm.f_frsize / 1e9, 1),
    )
    print_row(python=sys.version.split()[0], **{name: importlib.metadata.version(name) for name in PACKAGES})
    if not context.on_cpu:
        _describe_gpu(context)


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError as error:
        return repr(error)


def _describe_gpu(context: Context) -> None:
    import torch
    import torchvision

    libraries = Path(torchvision.__file__).parents[1] / "torchvision.libs"
    nvjpeg = ctypes.CDLL(str(next(libraries.glob("libnvjpeg*"))))
    torch.zeros(1, device="cuda")
    for name, number in NVJPEG_BACKENDS.items():
        handle = ctypes.c_void_p()
        status = nvjpeg.nvjpegCreateEx(number, None, None, 0, ctypes.byref(handle))
        print_row(nvjpeg_backend=name, is_available=status == 0)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    memory = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    host = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    product_s = seconds_per_call(lambda: left @ right, context)
    copy_s = seconds_per_call(lambda: memory[: 2**31].copy_(memory[2**31 :]), context)
    upload_s = seconds_per_call(lambda: memory[: 2**28].copy_(host, non_blocking=True), context)
    print_row(
        bfloat16_tflops=round(2 * 8192**3 / product_s / 1e12),
        copy_tb_per_s=round(2 * 2**31 / copy_s / 1e12, 2),
        upload_gb_per_s=round(2**28 / upload_s / 1e9, 1),
    )


def write_photographs(context: Context) -> None:
    """Write distinct photographs, and many links to them, so that the page cache holds each one once."""
    num_images, num_links = (64, 4) if context.on_cpu else (2048, 100)
    num_processes = os.cpu_count() or 1
    context.photographs.mkdir(parents=True, exist_ok=True)
    count = -(-num_images // num_processes)
    with spawned_processes() as pool:
        list(pool.map(_write_some, [(str(context.photographs), seed, count) for seed in range(num_processes)]))
    paths = sorted(context.photographs.iterdir())
    for number in range(num_links):
        _link_all(paths, context.work / "many" / f"{number:03d}")
    for number in range(4):  # four classes, each with a quarter of the photographs, four times
        for copy in range(4):
            _link_all(paths[number::4], context.work / "classes" / str(number) / str(copy))
    mean_kb = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    print_row(num_photographs=len(paths), num_links=len(paths) * num_links, mean_kb=round(mean_kb, 1))


def _write_some(job: tuple[str, int, int]) -> None:
    from cluster.local.photographs import crops, encode

    folder, seed, count = job
    for name, image in crops(count, seed=seed):
        Path(folder, f"{seed}-{name}.jpg").write_bytes(encode(image, quality=92))


def _link_all(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)


def run_tests(context: Context) -> None:
    """Run the tests that need a GPU. With `--cpu`, only collect them."""
    files = ["tests/engine/test_gpu.py", "tests/training/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run([*command, *(["--collect-only"] if context.on_cpu else [])], capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        print_row(test=line[:200])
    print_row(tests=done.stdout.strip().splitlines()[-1])
    done.check_returncode()
