"""Decoding and transforming on one core: timm's eval transform, `exact`, `fast`, and the library calls behind `fast`.

    python -m benchmarks.decode [--num-images 200] [--rounds 5]

The variants take turns. The benchmark prints the best round of each, in CPU milliseconds per image, and the ratios.
"""

import argparse
import io
import time
from collections.abc import Callable

import simplejpeg
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch.nn.functional import interpolate

from cluster.local.photographs import crops, encode
from pipelines.images.preprocess import make_preprocess
from pipelines.images.transform import EvalTransform

TRANSFORM = EvalTransform((224, 224), 0.875, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MAX_PIXELS = 178_956_970


def main() -> None:
    """Time the variants in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [encode(image, quality=94) for _, image in crops(args.num_images)]
    exact, fast = (make_preprocess(mode, TRANSFORM, MAX_PIXELS) for mode in ("exact", "fast"))
    variants: dict[str, Callable[[bytes], object]] = {
        "timm": _timm_transform(),
        "exact": lambda content: exact(content).pixels.tobytes(),
        "fast": lambda content: fast(content).pixels.tobytes(),
        "bare calls": _bare_calls,
    }
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(args.rounds):
        for name, preprocess in variants.items():
            best[name] = min(best[name], _cpu_seconds(preprocess, files))
    print(f"{args.num_images} photographs of {sum(map(len, files)) / len(files) / 1000:.0f} KB, one core")
    for name, seconds in best.items():
        print(f"{name:12}{1000 * seconds:8.2f} ms{1 / seconds:10.0f} images/s")
    for name, other in (("exact", "timm"), ("fast", "timm"), ("fast", "bare calls")):
        print(f"{name} / {other} = {best[other] / best[name]:.2f}")


def _cpu_seconds(preprocess: Callable[[bytes], object], files: list[bytes]) -> float:
    started = time.thread_time()
    for content in files:
        preprocess(content)
    return (time.thread_time() - started) / len(files)


def _timm_transform() -> Callable[[bytes], object]:
    transform = create_transform((3, *TRANSFORM.input_size), interpolation="bicubic", crop_pct=TRANSFORM.crop_pct)

    def transformed(content: bytes) -> object:
        return transform(Image.open(io.BytesIO(content)).convert("RGB"))

    return transformed


def _bare_calls(content: bytes) -> object:
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(content))[None].permute(0, 3, 1, 2)
    return interpolate(pixels, size=(256, 341), mode="bicubic", antialias=True)


if __name__ == "__main__":
    main()
