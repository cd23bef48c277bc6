"""Baseline: batch inference as in Ray's documentation, with timm instead of torchvision.

It uses `read_images`, `map` with the model's eval transform (float32 through the object store), `map_batches` with an
eager model in an actor, and `write_parquet`. It is a separate program, so that its start-up time counts as ours does:

    python -m benchmarks.ray_pattern INPUT_URI OUTPUT_URI MODEL WEIGHTS
"""

import logging
import os
import sys
from typing import Any

import pyarrow.fs
import ray

BATCH_SIZE = 32


class Preprocess:
    """Eval transform of the model, applied to one image at a time."""

    def __init__(self, model_name: str) -> None:
        import timm
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        cfg: Any = timm.get_pretrained_cfg(model_name)
        self.transform = create_transform(**resolve_data_config({}, pretrained_cfg=cfg.to_dict()), is_training=False)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return `tensor` (3 x 224 x 224, float32) for `image` (height x width x 3, uint8)."""
        from PIL import Image

        return {"path": row["path"], "tensor": self.transform(Image.fromarray(row["image"])).numpy()}


class Classify:
    """Eager model."""

    def __init__(self, model_name: str, weights: str) -> None:
        import timm

        self.model: Any = timm.create_model(model_name, checkpoint_path=weights).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return `index`, `prob` and `embedding` for a batch of tensors."""
        import torch

        with torch.inference_mode():
            features = self.model.forward_features(torch.from_numpy(batch["tensor"]))
            embedding = self.model.forward_head(features, pre_logits=True)
            prob, index = self.model.get_classifier()(embedding).softmax(dim=-1).topk(5)
        return {"path": batch["path"], "index": index.numpy(), "prob": prob.numpy(), "embedding": embedding.numpy()}


def main(input_uri: str, output_uri: str, model_name: str, weights: str) -> None:
    """Label every image under `input_uri`."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint) if input_uri.startswith("s3://") else None
    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    transform: dict[str, Preprocess] = {}

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        if model_name not in transform:
            transform[model_name] = Preprocess(model_name)
        return transform[model_name](row)

    (
        ray.data.read_images(input_uri.removeprefix("s3://"), filesystem=filesystem, mode="RGB", include_paths=True)
        .map(preprocess)
        .map_batches(
            Classify,
            fn_constructor_args=(model_name, weights),
            batch_size=BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(output_uri.removeprefix("s3://"), filesystem=filesystem)
    )
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
