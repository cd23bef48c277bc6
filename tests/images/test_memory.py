"""Memory for decoding: the peak of one image by format, and the budget that many images share."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import ItemError, RunError
from pipelines.images import memory
from pipelines.images.decode import decode_rgb
from pipelines.images.memory import BYTES_PER_PIXEL, DECODING_SHARE, SLOT_BYTES, MemoryBudget, node_budget
from pipelines.images.preprocess import Mode, make_preprocess
from pipelines.images.transform import EvalTransform
from pipelines.runtime.nodes import this_machine
from tests.support.broken import png_chunk
from tests.support.infer import REPOSITORY

MEASURE = """
import sys, threading
from pathlib import Path
from pipelines.images import decode, memory
from pipelines.images.transform import EvalTransform
from pipelines.images.preprocess import make_preprocess
path, lock, budget_bytes, num_images = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
memory.node_budget = lambda: memory.MemoryBudget(lock, budget_bytes)
content = Path(path).read_bytes()
transform = EvalTransform((64, 64), 0.875, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
preprocess = make_preprocess("exact", transform, 10**8)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
decode._safe_formats()
before = peak()
threads = [threading.Thread(target=preprocess, args=(content,)) for _ in range(num_images)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(peak() - before)
"""


def measure(path: Path, budget_bytes: float, num_images: int) -> int:
    """Return the bytes by which memory peaks in a process that decodes one file in many threads at once."""
    command = [sys.executable, "-c", MEASURE, str(path), str(path.parent / "lock"), str(budget_bytes), str(num_images)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def save(path: Path, side: int) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (side // 20, side // 20, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize((side, side))
    options: dict[str, dict[str, Any]] = {
        ".webp": {"lossless": True, "method": 0},
        ".jp2": {},
        ".avif": {"speed": 10, "subsampling": "4:4:4"},
    }
    (image if path.suffix == ".jp2" else image.convert("RGB")).save(path, **options[path.suffix])
    return path


@pytest.mark.parametrize(("name", "plugin"), [("a.webp", "WEBP"), ("a.jp2", "JPEG2000"), ("a.avif", "AVIF")])
def test_decoders_stay_within_their_bytes_per_pixel(name: str, plugin: str, tmp_path: Path) -> None:
    side = 1500
    num_bytes = measure(save(tmp_path / name, side), budget_bytes=1e12, num_images=1)
    assert num_bytes < 1.1 * BYTES_PER_PIXEL[plugin] * side**2


@pytest.mark.slow
def test_forty_images_at_once_stay_within_the_budget(tmp_path: Path) -> None:
    path = save(tmp_path / "a.webp", side=2000)  # 96 MB each
    assert measure(path, budget_bytes=3e8, num_images=40) < 3.5e8


@pytest.fixture
def small_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = MemoryBudget(str(tmp_path / "lock"), 2 * SLOT_BYTES)
    monkeypatch.setattr(memory, "node_budget", lambda: budget)


@pytest.mark.usefixtures("small_budget")
def test_fallback_to_another_decoder_does_not_deadlock() -> None:
    image = Image.new("RGB", (4000, 2500), (1, 2, 3))
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG")
    image.save(png, "PNG", compress_level=1)
    damaged_text = png_chunk(b"tEXt", b"a\0b")[:-4] + bytes(4)
    for mode in MODES:
        preprocess = make_preprocess(mode, IMAGENET, 10**8)
        with pytest.raises(ItemError, match="truncated"):
            preprocess(jpeg.getvalue()[:-2000])
        assert preprocess(png.getvalue()[:33] + damaged_text + png.getvalue()[33:]).width == 4000


IMAGENET = EvalTransform((224, 224), 0.875, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
MODES: tuple[Mode, ...] = ("exact", "fast")


def acquire_in_thread(budget: MemoryBudget, num_bytes: float) -> threading.Event:
    """Start a thread that acquires memory. Return the event that it sets afterwards."""
    acquired = threading.Event()

    def acquire() -> None:
        budget.acquire(num_bytes)
        acquired.set()

    threading.Thread(target=acquire, daemon=True).start()
    return acquired


def test_memory_of_a_killed_process_is_released(tmp_path: Path) -> None:
    budget = MemoryBudget(str(tmp_path / "lock"), 4 * SLOT_BYTES)
    code = f"""
import sys, time
from pipelines.images.memory import MemoryBudget
held = MemoryBudget({budget.path!r}, {budget.num_bytes!r}).acquire({budget.num_bytes!r})
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        acquired = acquire_in_thread(budget, SLOT_BYTES)
        assert not acquired.wait(0.3)
        holder.kill()
        assert acquired.wait(10)


def test_acquire_waits_for_a_released_slot(tmp_path: Path) -> None:
    budget = MemoryBudget(str(tmp_path / "lock"), 5 * SLOT_BYTES)
    first, second = budget.acquire(2 * SLOT_BYTES), budget.acquire(3 * SLOT_BYTES)
    acquired = acquire_in_thread(budget, 2 * SLOT_BYTES)
    assert not acquired.wait(0.2)
    os.close(first)
    assert acquired.wait(10)
    os.close(second)


def test_image_larger_than_the_budget_takes_all_of_it(tmp_path: Path) -> None:
    budget = MemoryBudget(str(tmp_path / "lock"), 2 * SLOT_BYTES)
    held = budget.acquire(100 * SLOT_BYTES)
    acquired = acquire_in_thread(budget, SLOT_BYTES)
    assert not acquired.wait(0.2)
    os.close(held)
    assert acquired.wait(10)


def test_symlink_in_place_of_the_lock_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="lock"):
        MemoryBudget(str(tmp_path / "lock"), 1e9).acquire(1e8)
    assert not (tmp_path / "elsewhere").exists()


def test_unusable_lock_file_fails_the_run_not_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "node_budget", lambda: MemoryBudget(str(tmp_path / "absent" / "lock"), 1e9))
    content = io.BytesIO()
    Image.new("L", (4000, 3000)).save(content, "PNG")
    with pytest.raises(RunError, match="absent"):
        decode_rgb(content.getvalue(), 10**8)


def test_budget_is_the_fraction_that_the_plan_leaves_free() -> None:
    assert node_budget().num_bytes == pytest.approx(DECODING_SHARE * this_machine().memory_bytes)
