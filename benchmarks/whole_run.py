"""Whole runs side by side, start-up included: Ray's documented pattern and ours, from the same S3 store.

    python -m benchmarks.whole_run [--num-images 1000] [--model ecaresnet50d_pruned] [--rounds 1]

Prints one line a run, then the ratio of the rates in each round.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.local import object_store
from cluster.photographs import write_crops

RUN_TIMEOUT_S = 1800


def main() -> None:
    """Run the peers in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--model", default="ecaresnet50d_pruned")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with object_store(buckets=("images", "results")) as store, tempfile.TemporaryDirectory() as folder:
        os.environ.update(store.environment())
        num_bytes = write_crops("s3://images/photographs", args.num_images, quality=94)
        print(f"{args.num_images} photographs, {num_bytes / args.num_images / 1000:.0f} KB each, {args.model}")
        weights = _save_random_weights(args.model, Path(folder) / "weights.safetensors")
        for index in range(args.rounds):
            rates = {name: _run(name, args, weights, index) for name in ("ray_pattern", "ecaray")}
            print(f"round {index}: ecaray / ray_pattern = {rates['ecaray'] / rates['ray_pattern']:.2f}", flush=True)


def _save_random_weights(model: str, path: Path) -> Path:
    # In a process of its own: importing timm here would warm nothing the runs use, but would hold memory.
    code = (
        "import sys, timm, torch, safetensors.torch as st; torch.manual_seed(0); "
        "st.save_file(timm.create_model(sys.argv[1]).state_dict(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, model, str(path)], check=True)
    return path


def _run(name: str, args: argparse.Namespace, weights: Path, index: int) -> float:
    """Run one peer as a program of its own; returns images per second over its whole run."""
    output = f"s3://results/{name}-{index}"
    if name == "ray_pattern":
        command = ["benchmarks.ray_pattern", "s3://images/photographs", output, args.model, str(weights)]
    else:
        command = ["jobs.infer", "--input.uri", "s3://images/photographs", "--output.uri", output]
        command += ["--model.name", args.model, "--model.weights", str(weights)]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    elapsed = time.monotonic() - started
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    rate: float = args.num_images / elapsed
    print(f"round {index}: {name:12} {elapsed:7.1f} s {rate:7.1f} images/s, whole run", flush=True)
    return rate


if __name__ == "__main__":
    main()
