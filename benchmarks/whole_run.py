"""Whole runs side by side, including start-up, from the same S3 store: ecaray and its peers.

    python -m benchmarks.whole_run [--num-images 1000] [--model ecaresnet50d_pruned] [--rounds 1] [--programs ...]

The peers are the documented patterns of Ray and Daft, and the loop of timm's `inference.py` (eager, channels-last and
compiled). The benchmark prints a line for each run, then each rate of a round relative to Ray's pattern. If a program
measures its steady state, that is printed too; `jobs.benchmark` measures ours.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.local.object_store import object_store
from cluster.local.photographs import write_crops

RUN_TIMEOUT_S = 1800
INPUT_URI = "s3://images/photographs"
BASELINE = "ray"
PEERS = {
    BASELINE: ("benchmarks.ray_pattern",),
    "daft": ("benchmarks.daft_pattern",),
    "timm": ("benchmarks.timm_inference", "eager"),
    "timm-channels-last": ("benchmarks.timm_inference", "channels_last"),
    "timm-compiled": ("benchmarks.timm_inference", "compiled"),
}
OURS = {
    "ecaray": (),
    "ecaray-fast": ("--preprocess.mode", "fast"),
    "ecaray-bfloat16": ("--preprocess.mode", "fast", "--model.dtype", "bfloat16"),
    "ecaray-int8": ("--preprocess.mode", "fast", "--model.dtype", "int8", "--model.quantization.min_agreement", "0"),
}


def main() -> None:
    """Run the programs in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--model", default="ecaresnet50d_pruned")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--programs", nargs="+", choices=[*PEERS, *OURS], default=[BASELINE, "ecaray"])
    args = parser.parse_args()
    with object_store(buckets=("images", "results")) as store, tempfile.TemporaryDirectory() as folder:
        os.environ.update(store.environment())
        num_bytes = write_crops(INPUT_URI, args.num_images, quality=94)
        print(f"{args.num_images} photographs, {num_bytes / args.num_images / 1000:.0f} KB each, {args.model}")
        weights = _save_random_weights(args.model, Path(folder) / "weights.safetensors")
        for index in range(args.rounds):
            rates = {name: _run(name, args, weights, index) for name in args.programs}
            if BASELINE in rates:
                ratios = ", ".join(f"{name} {rate / rates[BASELINE]:.2f}" for name, rate in rates.items())
                print(f"round {index}, relative to Ray's pattern: {ratios}", flush=True)


def _save_random_weights(model: str, path: Path) -> Path:
    # A separate process, because timm would stay in the memory of this one.
    code = (
        "import sys, timm, torch, safetensors.torch as st; torch.manual_seed(0); "
        "st.save_file(timm.create_model(sys.argv[1]).state_dict(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, model, str(path)], check=True)
    return path


def _run(name: str, args: argparse.Namespace, weights: Path, index: int) -> float:
    """Run one program, and return its images/s over the whole run."""
    output = f"s3://results/{name}-{index}"
    if name in PEERS:
        module, *options = PEERS[name]
        command = [module, INPUT_URI, output, args.model, str(weights), *options]
    else:
        command = ["jobs.infer", "--input.uri", INPUT_URI, "--output.uri", output]
        command += ["--model.name", args.model, "--model.weights", str(weights), *OURS[name]]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    elapsed = time.monotonic() - started
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    rate: float = args.num_images / elapsed
    steady = [line for line in done.stdout.splitlines() if line.startswith("steady")]
    print(f"round {index}: {name:20} {elapsed:7.1f} s {rate:7.1f} images/s", *steady, flush=True)
    return rate


if __name__ == "__main__":
    main()
