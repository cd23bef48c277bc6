"""Cost of data loading in training: steps on images in memory, compared with `jobs.train` on photographs.

    python -m benchmarks.ingest --use-gpu [--model ecaresnet50d] [--batch-size 256] [--dtype bfloat16]
    python -m benchmarks.ingest --model ecaresnet26t --batch-size 16 --num-images 128 --dtype float32   # on CPUs

Both are measured with and without `torch.compile`. The first steps, which compile, are excluded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cluster.local.photographs import write_crops

NUM_CLASSES = 4
NUM_WARM_UP_STEPS, MIN_STEP_S = 5, 10.0
RUN_TIMEOUT_S = 1800


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ecaresnet50d")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-images", type=int, default=16384, help="number of photographs of 59 KB in an epoch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--use-gpu", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(NUM_CLASSES):
            write_crops(str(folder / "images" / str(index)), args.num_images // NUM_CLASSES)
        print(f"{args.model} at {args.image_size}, batches of {args.batch_size}, {args.dtype}")
        for is_compiled in (False, True):
            config = build_request(args, folder, is_compiled)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # releases the GPU memory at its end
                in_memory = process.submit(train_from_memory, config, args.image_size).result(RUN_TIMEOUT_S)
            streamed = train(config)
            title = "compiled" if is_compiled else "eager"
            print(
                f"{title:9} in memory {in_memory:9.1f} images/s; jobs.train {streamed:9.1f} images/s: "
                f"{streamed / in_memory:.0%}",
                flush=True,
            )


def build_request(args: argparse.Namespace, folder: Path, is_compiled: bool) -> dict[str, Any]:
    """Return the config of `jobs.train`."""
    return {
        "data": {"train": {"uri": str(folder / "images")}},
        "output": {"uri": str(folder / f"run-{is_compiled}")},
        "model": {"name": args.model, "weights": "random", "dtype": args.dtype, "compile": is_compiled},
        "preprocess": {"image_size": args.image_size},
        "optim": {
            "epochs": 2,
            "global_batch_size": args.batch_size,
            "lr": 0.05,
        },
        "scaling": {"use_gpu": args.use_gpu},
    }


def train_from_memory(request: dict[str, Any], image_size: int) -> float:
    """Return the images/s of training steps that repeat one batch."""
    import numpy as np
    import timm
    import torch

    from pipelines.config.train import TrainConfig
    from pipelines.training.learner import Learner, Task

    config = TrainConfig.model_validate(request)
    module = timm.create_model(config.model.name, num_classes=NUM_CLASSES)
    task = Task(config.model.name, NUM_CLASSES, (0.5,) * 3, (0.25,) * 3, steps_per_epoch=1000)
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    learner = Learner(config, task, module, device)
    num_rows = config.optim.global_batch_size
    local_batch = {
        "image": np.random.default_rng(0).integers(0, 256, (num_rows, image_size, image_size, 3), np.uint8),
        "target": np.arange(num_rows) % NUM_CLASSES,
        "id": np.arange(num_rows),
        "error": np.array([""] * num_rows),
    }
    for _ in range(NUM_WARM_UP_STEPS):
        float(learner.learn(local_batch))
    started, num_steps = time.monotonic(), 0
    while time.monotonic() - started < MIN_STEP_S:
        loss = learner.learn(local_batch)
        num_steps += 1
    float(loss)  # wait for the last step
    return num_steps * num_rows / (time.monotonic() - started)


def train(request: dict[str, Any]) -> float:
    """Run `jobs.train` and return the images/s of its last epoch."""
    output = Path(request["output"]["uri"])
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(request))
    command = [sys.executable, "-m", "jobs.train", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"jobs.train failed:\n{done.stderr[-4000:]}")
    return float(json.loads((output / "_run.json").read_text())["history"][-1]["images_per_s"])


if __name__ == "__main__":
    main()
