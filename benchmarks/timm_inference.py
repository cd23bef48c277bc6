"""Baseline: the loop of timm's `inference.py`, with its own loader, transform and model calls, on images in S3.

timm reads folders. Here a dataset fetches each image from the store in the loader's processes, as a user of timm would
write it. The rows are written to one Parquet file. It is a separate program, so that its start-up time counts as ours
does:

    python -m benchmarks.timm_inference INPUT_URI OUTPUT_URI MODEL WEIGHTS eager|channels_last|compiled

It prints the steady-state rate, which starts at the second batch.
"""

import io
import os
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from timm.data import create_loader, resolve_data_config

BATCH_SIZE = 32
NUM_LOADERS = 1  # on two cores, one loads while the other predicts


class StoredImages(torch.utils.data.Dataset[tuple[Any, int]]):
    """Dataset of the images under an S3 prefix."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.transform: Any = None
        self._filesystem: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._filesystem is None:  # each loader process opens its own
            self._filesystem = _filesystem()
        with self._filesystem.open_input_file(self.paths[index]) as file:
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
        return self.transform(image), index


def main(input_uri: str, output_uri: str, name: str, weights: str, variant: str) -> None:
    """Label every image under `input_uri`."""
    filesystem = _filesystem()
    selector = pyarrow.fs.FileSelector(input_uri.removeprefix("s3://"), recursive=True)
    paths = [info.path for info in filesystem.get_file_info(selector) if info.is_file]
    model: Any = timm.create_model(name, checkpoint_path=weights).eval()
    data = resolve_data_config({}, model=model)
    if variant == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    forward = torch.compile(_heads(model)) if variant == "compiled" else _heads(model)
    images: Any = StoredImages(paths)
    loader = create_loader(
        images, batch_size=BATCH_SIZE, use_prefetcher=False, num_workers=NUM_LOADERS, **_loader_args(data)
    )
    rows: list[pa.Table] = []
    times: list[tuple[int, float]] = []
    with torch.inference_mode():
        for batch, indices in loader:
            if variant == "channels_last":
                batch = batch.contiguous(memory_format=torch.channels_last)
            embedding, prob, index = forward(batch)
            rows.append(_table([paths[i] for i in indices], index.numpy(), prob.numpy(), embedding.numpy()))
            times.append((len(batch), time.monotonic()))
    with filesystem.open_output_stream(output_uri.removeprefix("s3://") + "/rows.parquet") as file:
        pq.write_table(pa.concat_tables(rows), file)
    steady = sum(count for count, _ in times[2:-1]) / (times[-2][1] - times[1][1])
    print(f"steady {steady:.3f}")


def _filesystem() -> Any:
    return pyarrow.fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL"))


def _heads(model: Any) -> Any:
    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = model.forward_features(images)
        embedding = model.forward_head(features, pre_logits=True)
        prob, index = model.get_classifier()(embedding).softmax(dim=-1).topk(5)
        return embedding, prob, index

    return forward


def _loader_args(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")}


def _table(paths: list[str], index: Any, prob: Any, embedding: Any) -> pa.Table:
    lists = {"index": index, "prob": prob, "embedding": embedding}
    columns = {
        name: pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).reshape(-1), values.shape[1])
        for name, values in lists.items()
    }
    return pa.table({"path": paths} | columns)


if __name__ == "__main__":
    main(*sys.argv[1:])
