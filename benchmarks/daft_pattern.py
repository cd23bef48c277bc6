"""Baseline: batch inference as in Daft's documentation, with timm's transform and model.

It uses `from_glob_path`, `download`, `decode_image`, a class with the model called on batches, and `write_parquet`. It
is a separate program, so that its start-up time counts as ours does:

    python -m benchmarks.daft_pattern INPUT_URI OUTPUT_URI MODEL WEIGHTS
"""

import os
import sys
from typing import Any

import daft
from daft import DataType, Series, col
from daft.functions import decode_image, download

BATCH_SIZE = 32
ROW = {"index": DataType.list(DataType.int64()), "prob": DataType.list(DataType.float32())}
ROW |= {"embedding": DataType.list(DataType.float32())}


@daft.cls(max_concurrency=1)
class Classify:
    """Model with its transform, loaded once."""

    def __init__(self, name: str, weights: str) -> None:
        import timm

        self.model: Any = timm.create_model(name, checkpoint_path=weights).eval()
        config = timm.data.resolve_data_config({}, model=self.model)
        self.transform = timm.data.create_transform(**config, is_training=False)

    @daft.method.batch(return_dtype=DataType.struct(ROW), batch_size=BATCH_SIZE)
    def __call__(self, images: Series) -> list[dict[str, Any]]:
        """Return `index`, `prob` and `embedding` for a batch of images."""
        import torch
        from PIL import Image

        batch = torch.stack([self.transform(Image.fromarray(image)) for image in images.to_pylist()])
        with torch.inference_mode():
            features = self.model.forward_features(batch)
            embedding = self.model.forward_head(features, pre_logits=True)
            prob, index = self.model.get_classifier()(embedding).softmax(dim=-1).topk(5)
        columns = (index.numpy(), prob.numpy(), embedding.numpy())
        return [dict(zip(ROW, values)) for values in zip(*columns)]


def main(input_uri: str, output_uri: str, name: str, weights: str) -> None:
    """Label every image under `input_uri`."""
    config = daft.io.S3Config(
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
        key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
        access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        region_name=os.environ.get("AWS_REGION", "us-east-1"),
    )
    io_config = daft.io.IOConfig(s3=config)
    classify: Any = Classify(name, weights)
    images = daft.from_glob_path(f"{input_uri}/**", io_config=io_config)
    images = images.with_column("image", decode_image(download(col("path"), io_config=io_config), mode="RGB"))
    images = images.with_column("row", classify(col("image")))
    images.select("path", col("row")).write_parquet(output_uri, io_config=io_config)


if __name__ == "__main__":
    main(*sys.argv[1:])
