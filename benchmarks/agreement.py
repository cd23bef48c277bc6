"""Agreement of the faster variants with float32 and timm's transform, for a model trained on real images.

    python -m benchmarks.agreement [--num-images 500] [--epochs 6] [--folder DIRECTORY]

The benchmark trains a network to tell from which photograph a crop was taken. Then each variant labels other crops,
half of them so large that `fast` scales them in the inverse DCT. It prints a table: accuracy, fraction of images with
the same top-1 as float32 with `exact`, and median cosine similarity of the embeddings. With `--folder`, all files are
kept, and a second call resumes.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.local.photographs import write_crops
from pipelines.outputs import open_output

MODEL = "ecaresnet50d_pruned"
TRAIN_SIZE, TEST_SIZE = 128, 160  # objects appear larger in training than at test time (FixRes, arXiv:1906.06423)
NUM_TRAIN = 800
SIZES = {"small": (500, 375), "large": (1500, 1125)}
RUN_TIMEOUT_S = 1800
INT8 = (
    "--model.dtype",
    "int8",
    "--model.quantization.min_agreement",
    "0",
)  # measure the agreement instead of refusing it
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32, exact": (),
    "float32, fast": ("--preprocess.mode", "fast"),
    "bfloat16, exact": ("--model.dtype", "bfloat16"),
    "int8, exact": INT8,
    "int8, fast": (*INT8, "--preprocess.mode", "fast"),
}


def main() -> None:
    """Train, label with each variant, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        weights = _train(folder, args.epochs)
        for seed, (kind, size) in enumerate(SIZES.items(), start=2):
            write_crops(str(folder / "images" / kind), args.num_images // 2, quality=94, seed=seed, size=size)
        tables = {
            variant: _label(folder, index, options, weights)
            for index, (variant, options) in enumerate(VARIANTS.items())
        }
    reference = tables["float32, exact"]
    print(f"{MODEL}, trained at {TRAIN_SIZE} px; {args.num_images} crops of photographs at {TEST_SIZE} px")
    print(f"{'variant':18}{'crops':8}{'accuracy':>10}{'same top-1':>12}{'median cosine':>15}{'lowest':>10}")
    for variant, table in tables.items():
        for kind in SIZES:
            ours, exact = _of_kind(table, kind), _of_kind(reference, kind)
            same, cosine = np.mean(_top1(ours) == _top1(exact)), _cosines(ours, exact)
            print(
                f"{variant:18}{kind:8}{_accuracy(ours):10.1%}{same:12.2%}{np.median(cosine):15.6f}{cosine.min():10.4f}",
                flush=True,
            )


def _of_kind(table: pa.Table, kind: str) -> pa.Table:
    return table.filter(pc.match_substring(table["uri"], f"/{kind}/"))


def _train(folder: Path, epochs: int) -> str:
    write_crops(str(folder / "train"), NUM_TRAIN, quality=94, seed=1)
    with (folder / "train.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "label"])
        rows.writerows([str(path), _label_of(path.name)] for path in sorted((folder / "train").iterdir()))
    summary = _run(
        "jobs.train",
        *("--data.train.uri", str(folder / "train.csv"), "--output.uri", str(folder / "run")),
        *("--model.name", MODEL, "--model.weights", "random", "--preprocess.image_size", str(TRAIN_SIZE)),
        *("--optim.epochs", str(epochs), "--optim.global_batch_size", "32", "--optim.opt", "adamw"),
        *("--optim.lr", "2e-3", "--optim.weight_decay", "0.05", "--optim.warmup_epochs", "1"),
        *("--augment.scale", "[0.5, 1.0]"),
    )
    weights: str = summary["checkpoint_uri"]
    return weights


def _label(folder: Path, index: int, options: tuple[str, ...], weights: str) -> pa.Table:
    output = folder / f"labels-{index}"
    _run(
        "jobs.infer",
        *("--input.uri", str(folder / "images"), "--output.uri", str(output)),
        *("--model.weights", weights, "--preprocess.image_size", str(TEST_SIZE), *options),
    )
    return open_output(str(output)).table()


def _run(module: str, *arguments: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, timeout=RUN_TIMEOUT_S, check=True
    )
    summary: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return summary


def _label_of(file_name: str) -> str:
    return file_name.partition("-")[2].removesuffix(".jpg")


def _top1(table: pa.Table) -> "np.ndarray[tuple[int], np.dtype[np.str_]]":
    return np.array([labels[0] for labels in table["label"].to_pylist()])


def _accuracy(table: pa.Table) -> float:
    truth = np.array([_label_of(uri.rpartition("/")[2]) for uri in table["uri"].to_pylist()])
    return float(np.mean(_top1(table) == truth))


def _cosines(table: pa.Table, reference: pa.Table) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    ours, theirs = (np.array(each["embedding"].to_pylist(), np.float64) for each in (table, reference))
    return np.asarray((ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)))


if __name__ == "__main__":
    main()
