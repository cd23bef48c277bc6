"""Training side by side with the loop of timm's `train.py`: same images, model, batch size and threads.

    python -m benchmarks.training [--num-images 256] [--model ecaresnet50d_pruned] [--rounds 1]

It prints the rate of the last of two epochs for each, which excludes start-up, and the speed-up of two workers with one
thread each over one worker.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.local.photographs import write_crops

RUN_TIMEOUT_S = 1200
NUM_CLASSES = 4
NUM_EPOCHS = 2


def main() -> None:
    """Run the programs in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--model", default="ecaresnet50d_pruned")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(NUM_CLASSES):
            write_crops(str(folder / "images" / str(index)), args.num_images // NUM_CLASSES)
        print(f"{args.num_images} photographs, {args.model} at {args.image_size}, batches of {args.batch_size}")
        for index in range(args.rounds):
            threads = os.cpu_count() or 1
            rates = {
                "timm": _timm(args, folder, threads, "contiguous"),
                "timm, channels-last": _timm(args, folder, threads, "channels_last"),
                "ecaray": _ours(args, folder, f"all-{index}", 1, threads),
                "ecaray, 1 worker, 1 thread": _ours(args, folder, f"one-{index}", 1, 1),
                "ecaray, 2 workers, 1 thread each": _ours(args, folder, f"two-{index}", 2, 0.75),
            }
            for name, rate in rates.items():
                print(f"round {index}: {name:32} {rate:7.2f} images/s", flush=True)
            fastest = max(rates["timm"], rates["timm, channels-last"])
            scaling = rates["ecaray, 2 workers, 1 thread each"] / rates["ecaray, 1 worker, 1 thread"]
            print(f"round {index}: ecaray / timm = {rates['ecaray'] / fastest:.2f}; 2 workers / 1 = {scaling:.2f}")


def _timm(args: argparse.Namespace, folder: Path, num_threads: int, layout: str) -> float:
    sizes = [args.image_size, args.batch_size, NUM_EPOCHS, num_threads, 1]
    printed = _run("benchmarks.timm_training", str(folder / "images"), args.model, *map(str, sizes), layout)
    return float(json.loads(printed)[-1])


def _ours(args: argparse.Namespace, folder: Path, name: str, num_workers: int, num_cpus: float) -> float:
    output = folder / name
    keys = {
        "data.train.uri": folder / "images",
        "output.uri": output,
        "model.name": args.model,
        "model.weights": "random",
        "preprocess.image_size": args.image_size,
        "optim.epochs": NUM_EPOCHS,
        "optim.global_batch_size": args.batch_size,
        "optim.lr": 0.05,
        "scaling.num_workers": num_workers,
    }
    if num_cpus < (os.cpu_count() or 1):
        keys["scaling.num_cpus_per_worker"] = str(num_cpus)
    _run("jobs.train", *[word for key, value in keys.items() for word in (f"--{key}", str(value))])
    return float(json.loads((output / "_run.json").read_text())["history"][-1]["images_per_s"])


def _run(*command: str) -> str:
    """Run a module as a separate program, and return the last line of its stdout."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
