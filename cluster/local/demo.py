"""Demo of the jobs on this machine, run by their command lines, with input and output in an S3 store.

    python -m cluster.local.demo

The demo starts an object store. `jobs.infer` labels and embeds photographs. Then `jobs.train` trains a small ECA ResNet
on handwritten digits with two workers, `jobs.evaluate` measures it on held-out digits, and `jobs.infer` labels these.
The results are copied to `.demo/`, where they remain.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.local.digits import write_digits
from cluster.local.object_store import object_store
from cluster.local.photographs import write_crops
from pipelines.outputs import open_output
from pipelines.storage.filesystem import open_filesystem

NUM_PHOTOGRAPHS = 240
NUM_SHOWN = 8
NUM_LABELS_SHOWN = 5
MODEL = "ecaresnet50d_pruned"
INPUT_URI = "s3://images/photographs"
OUTPUT_URI = "s3://results/photographs"
TRAIN_URI, HELD_OUT_URI = "s3://images/digits/train", "s3://images/digits/held-out"
RUN_URI, DIGITS_URI = "s3://results/digits-run", "s3://results/digits"
JOB_TIMEOUT_S = 600


def main() -> None:
    """Run the demo."""
    folder = Path(".demo")
    shutil.rmtree(folder, ignore_errors=True)
    with object_store(buckets=("images", "results")) as store:
        os.environ.update(store.environment())
        say(f"An S3 store (SeaweedFS) is running at {store.endpoint}")
        label_photographs(folder / "photographs")
        learn_digits(folder / "digits")


def label_photographs(folder: Path) -> None:
    """Label and embed photographs, and copy the Parquet files to `folder`."""
    num_bytes = write_crops(INPUT_URI, NUM_PHOTOGRAPHS)
    say(f"{NUM_PHOTOGRAPHS} photographs are in {INPUT_URI}: JPEG files, {num_bytes / 1e6:.1f} MB")
    arguments = ["--input.uri", INPUT_URI, "--output.uri", OUTPUT_URI, "--model.name", MODEL]
    summary = run_job("jobs.infer", [*arguments, "--model.weights", choose_weights()])
    fetch(OUTPUT_URI, folder)
    show(folder, summary)


def learn_digits(folder: Path) -> None:
    """Train on digits, evaluate and label, and copy curves, metrics and Parquet files to `folder`."""
    num_train, num_held_out = write_digits(TRAIN_URI, HELD_OUT_URI)
    say(f"\n{num_train:,} handwritten digits are in {TRAIN_URI}, {num_held_out} more in {HELD_OUT_URI}")
    data = ["--data.train.uri", TRAIN_URI, "--data.validation.uri", HELD_OUT_URI]
    trained = run_job("jobs.train", ["--config", "configs/train/digits.yaml", *data, "--output.uri", RUN_URI])
    weights = ["--model.weights", trained["checkpoint_uri"]]
    measured = run_job("jobs.evaluate", ["--input.uri", HELD_OUT_URI, *weights])
    run_job("jobs.infer", ["--input.uri", HELD_OUT_URI, "--output.uri", DIGITS_URI, *weights])
    fetch(DIGITS_URI, folder / "labels")
    for name in ("curves.png", "metrics.jsonl"):
        fetch(f"{RUN_URI}/{name}", folder / name)
    rows = open_output(DIGITS_URI).table(["uri", "label"]).to_pylist()
    num_right = sum(row["label"][0] == row["uri"].split("/")[-2] for row in rows)
    say(
        f"\nTrained in {trained['wall_time_s']:.0f} s. Top-1 on {measured['num_images']} held-out digits: "
        f"{trained['top1']:.4f} by train, {measured['top1']:.4f} by evaluate, {num_right / len(rows):.4f} from the "
        f"labels that infer wrote.\nCurves, metrics and labels are in {folder}."
    )


def fetch(uri: str, target: Path) -> None:
    """Copy an object, or all objects under a prefix, to a local path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    filesystem, path = open_filesystem(uri)
    filesystem.get(path, str(target), recursive=True)


def choose_weights() -> str:
    """Return `pretrained` if the model hub is reachable, else print the reason and return `random`."""
    # Importing timm takes seconds and memory. A separate process releases the memory before the job runs.
    code = "import sys; from pipelines.models.hub import why_unavailable; print(why_unavailable(sys.argv[1]) or '')"
    asked = subprocess.run([sys.executable, "-c", code, MODEL], capture_output=True, text=True, timeout=120, check=True)
    reason = asked.stdout.strip()
    if not reason:
        return "pretrained"
    say(f"{reason}\nThis demo therefore uses RANDOM weights: labels and probabilities are meaningless.")
    return "random"


def run_job(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a job as a user would, and return its summary, which is the last line of its stdout."""
    command = [sys.executable, "-m", module, *arguments]
    say(f"\n$ python {' '.join(command[1:])}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=JOB_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{module} exited with status {done.returncode}; see its error above")
    summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return summary


def show(output: Path, summary: dict[str, Any]) -> None:
    """Print a table of a few photographs, the rate, and a query to try next."""
    rows = open_output(str(output)).table()
    step = max(1, rows.num_rows // NUM_SHOWN)
    say(f"\n{'photograph':28}{'size':>10}   top-{NUM_LABELS_SHOWN} labels, probability")
    for row in rows.take(list(range(0, rows.num_rows, step)))[:NUM_SHOWN].to_pylist():
        labels = "; ".join(f"{label.split(',')[0]} {prob:.4f}" for label, prob in zip(row["label"], row["prob"]))
        name = row["uri"].rpartition("/")[2]
        say(f"{name:28}{row['width']:>5} x {row['height']:<3}  {labels}")
    dimension = rows.schema.field("embedding").type.list_size
    say(
        f"\n{summary['num_ok']} images labelled, {summary['num_failed']} failed, in {summary['wall_time_s']:.1f} s: "
        f"{summary['images_per_s']:.1f} images/s with start-up; embeddings of {dimension} float32 values"
    )
    columns = "uri, label[1] AS label, prob[1] AS prob, len(embedding) AS num_features"
    query = f"SELECT {columns} FROM '{output}/part-*.parquet' LIMIT 5"  # noqa: S608
    say(f"The Parquet files are in {output}. To query them:\n")
    say(f'  .venv/bin/python -c "import duckdb; duckdb.sql(\\"{query}\\").show()"')


def say(text: str) -> None:
    """Print and flush, so that the text appears before the output of the next job."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
