"""Resuming a large run that was killed: time and memory until the first new file.

    python -m benchmarks.resume [--num-inputs 1000000] [--num-missing 10000] [--model mobilenetv3_small_050]

The benchmark creates an output in an S3 store that lacks only the rows of every n-th ID, as if the run had been killed.
It prints the time from the start of `jobs.infer` to its first new file, and the peak memory of the job and of Ray until
then (proportional set size). For comparison, it prints the same for a new run over the same number of missing rows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from cluster.local.object_store import object_store
from cluster.local.photographs import crops, encode
from cluster.local.processes import descendants, memory_bytes
from pipelines.inputs.listing import LISTING_SCHEMA
from pipelines.inputs.manifest import write_manifest
from pipelines.inputs.reader import Listing
from pipelines.outputs import Output, run_record
from pipelines.outputs.columns import Embedding, TopK
from pipelines.outputs.file_names import list_files
from pipelines.outputs.schema import parts_schema
from pipelines.outputs.writer import PartWriter
from pipelines.storage.bulk import store_object

INPUT_URI = "s3://images/many"
COMMIT_ROWS = 2048
NUM_WRITERS = 8
TIMEOUT_S = 600
POLL_S = 0.25


def main() -> None:
    """Print a line for a new run and a line for a resumed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-inputs", type=int, default=1_000_000)
    parser.add_argument("--num-missing", type=int, default=10_000)
    parser.add_argument("--model", default="mobilenetv3_small_050")
    args = parser.parse_args()
    with object_store(buckets=("images", "results")) as store, tempfile.TemporaryDirectory() as folder:
        os.environ.update(store.environment())
        missing = np.linspace(0, args.num_inputs - 1, args.num_missing).astype(np.int64)
        _write_images(missing)
        weights = f"{folder}/weights.safetensors"
        _save_weights(args.model, weights)
        for name, num_inputs, ids in (
            ("new run", args.num_missing, np.arange(args.num_missing)),
            ("resumed", args.num_inputs, missing),
        ):
            output_uri = f"s3://results/{name.replace(' ', '-')}"
            command = [sys.executable, "-m", "jobs.infer", "--input.uri", INPUT_URI, "--output.uri", output_uri]
            command += ["--model.name", args.model, "--model.weights", weights, "--output.commit_rows", "16"]
            command += ["--failure.max_fraction", "1"]
            _write_output(output_uri, num_inputs, ids, command)
            seconds, peak_bytes, driver_bytes = _first_file(command, output_uri)
            print(
                f"{name:10}: {num_inputs:,} inputs, {num_inputs - len(ids):,} of them done: first new file after "
                f"{seconds:.1f} s; peak memory {peak_bytes / 1e9:.2f} GB, driver {driver_bytes / 1e9:.2f} GB",
                flush=True,
            )


def _name(index: int) -> str:
    return f"{INPUT_URI}/{index:09d}.jpg"


def _write_images(ids: np.ndarray) -> None:
    contents = [encode(image) for _, image in crops(64, size=(160, 120))]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(lambda index: store_object(_name(index), contents[index % 64]), ids.tolist()))


def _save_weights(model: str, path: str) -> None:
    saving = "st.save_file(timm.create_model(sys.argv[1]).state_dict(), sys.argv[2])"
    code = f"import sys, timm, safetensors.torch as st; {saving}"
    subprocess.run([sys.executable, "-c", code, model, path], check=True)


def _write_output(output_uri: str, num_inputs: int, missing: np.ndarray, command: list[str]) -> None:
    """Write the output of a killed run: `_run.json` by the job itself, then the manifest and files in its format."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while run_record.find_run(output_uri) is None:
        time.sleep(POLL_S)
    process.kill()
    process.wait()
    record = run_record.find_run(output_uri)
    assert record is not None
    columns = [[_name(index) for index in range(num_inputs)], [0] * num_inputs, [""] * num_inputs]
    write_manifest(Output(output_uri).manifest_uri, INPUT_URI, [], Listing(pa.table(columns, schema=LISTING_SCHEMA), 0))
    model = SimpleNamespace(num_features=record["num_features"], label_names=())
    schema = parts_schema((TopK(5), Embedding()), model)
    writer = PartWriter(output_uri, schema, {"fingerprint": record["fingerprint"]})
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(lambda ids: writer(_rows(ids, schema)), _parts(num_inputs, missing)))


def _parts(num_inputs: int, missing: np.ndarray) -> Iterator[np.ndarray]:
    done = np.setdiff1d(np.arange(num_inputs), missing)
    yield from (done[start : start + COMMIT_ROWS] for start in range(0, len(done), COMMIT_ROWS))


def _rows(ids: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Return rows as a run would write them. Their content is constant, since a resumed run reads only the IDs."""
    num_features = schema.field("embedding").type.list_size
    row = {
        "width": 160,
        "height": 120,
        "index": [1, 2, 3, 4, 5],
        "prob": [0.2] * 5,
        "label": ["a"] * 5,
        "embedding": [0.5] * num_features,
        "error_kind": None,
        "error_message": None,
        "num_retries": 0,
    }
    types = {"error_kind": pa.string(), "error_message": pa.string(), "num_retries": pa.int32()}
    columns = {name: pa.array([value], types.get(name) or schema.field(name).type) for name, value in row.items()}
    repeated = {name: column.take(pa.array([0] * len(ids))) for name, column in columns.items()}
    return pa.table({"id": ids, "uri": [_name(index) for index in ids.tolist()], **repeated})


def _first_file(command: list[str], output_uri: str) -> tuple[float, int, int]:
    """Return the seconds until a new file exists, and the peak memory of all processes and of the driver in bytes."""
    before = set(list_files(output_uri))
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    peak = driver = 0
    try:
        while set(list_files(output_uri)) == before:
            own = memory_bytes(process.pid)
            peak, driver = max(peak, own + sum(map(memory_bytes, descendants(process.pid)))), max(driver, own)
            assert process.poll() is None, "the job ended without a new file"
            assert time.monotonic() - started < TIMEOUT_S, f"no new file within {TIMEOUT_S} s"
            time.sleep(POLL_S)
        return time.monotonic() - started, peak, driver
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
