"""JPEG decoding, resizing and cropping on a GPU, with nvJPEG through torchvision.

Not measured on a GPU yet. On a CPU device, libjpeg-turbo runs the same steps. torchvision has deprecated its decoders
since 0.29, in favour of TorchCodec.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.errors import ItemError, RunError
from pipelines.images.fast import preprocess_fast
from pipelines.images.jpeg import Coding, coding_of
from pipelines.images.transform import EvalTransform

log = logging.getLogger(__name__)

# Limit on the mean absolute difference of values up to 255. Decoders round chroma and upsample it differently.
MAX_MEAN_DIFFERENCE = 4
# A device that has rejected this many files of a coding, and accepted none, does not support it. A single rejected file
# may just be damaged.
NUM_REJECTED = 2


class Device(Protocol):
    """Device that decodes: the part of `pipelines.models.accelerators.base.Accelerator` that is needed here."""

    device: torch.device

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""

    def synchronize_stream(self) -> None:
        """Wait until the device has finished the work of the current stream."""

    def release_cached_memory(self) -> None:
        """Release the device memory that torch caches."""


class DeviceDecoder:
    """Decoder of JPEG batches on one device. Files that it rejects are decoded on the CPU, as in mode `fast`.

    A device rejects a whole batch because of one file, without naming it. The first files of each coding are therefore
    decoded alone. Once a coding is known, its files join the batch or go to the CPU at once.

    Args:
        transform: Eval transform.
        max_pixels: Size limit, in pixels, of a decoded and of a resized image.
        accelerator: Device to decode on.

    Raises:
        RunError: The device or this build of torchvision cannot decode JPEGs, or decodes them to wrong pixels.
    """

    def __init__(self, transform: EvalTransform, max_pixels: int, accelerator: Device) -> None:
        self._transform, self._max_pixels, self._accelerator = transform, max_pixels, accelerator
        self._device = accelerator.device
        self._has_warned = False
        self._supported: set[Coding] = set()
        self._num_rejected: Counter[Coding] = Counter()
        self._self_test()

    def __call__(self, contents: Sequence[bytes]) -> list[torch.Tensor | ItemError]:
        """Decode a batch.

        Args:
            contents: JPEG files for which `size_for_device` returns a size.

        Returns:
            For each file, height x width x 3 uint8 on the device, or the error.
        """
        results: dict[int, torch.Tensor | ItemError] = {}
        for position, content in enumerate(contents):
            coding = coding_of(content)
            if coding not in self._supported:
                is_rejected = self._num_rejected[coding] >= NUM_REJECTED
                results[position] = self._decode_on_cpu(content) if is_rejected else self._try(content, coding)
        batch = [position for position in range(len(contents)) if position not in results]
        results |= zip(batch, self._decode_batch([contents[position] for position in batch]))
        return [results[position] for position in range(len(contents))]

    def _try(self, content: bytes, coding: Coding) -> torch.Tensor | ItemError:
        """Decode the first file of a coding, or the next one after a rejected file, and remember the outcome."""
        found = self._decode_alone(content)
        if found is None:
            self._num_rejected[coding] += 1
            return self._decode_on_cpu(content)
        self._supported.add(coding)
        return found

    def _decode_batch(self, contents: Sequence[bytes]) -> list[torch.Tensor | ItemError]:
        """Decode files of supported codings, and split them in halves if the device fails."""
        if not contents:
            return []
        try:
            return [self._resize_and_crop(pixels) for pixels in self._decode(contents)]
        except RuntimeError:
            pass  # the device rejects one of the files without naming it, or ran out of memory
        self._accelerator.synchronize()  # decoding still writes to memory that has been freed by now
        if len(contents) == 1:
            found = self._decode_alone(contents[0])
            return [self._decode_on_cpu(contents[0]) if found is None else found]
        half = len(contents) // 2
        return [*self._decode_batch(contents[:half]), *self._decode_batch(contents[half:])]

    def _self_test(self) -> None:
        """Decode a colour image with halved chroma and a greyscale one, and compare the pixels with a CPU's."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 256))
        colour = np.stack([ramp, ramp.T, ramp[::-1]], axis=2)
        grey = np.ascontiguousarray(ramp[..., None])
        encoded = [
            simplejpeg.encode_jpeg(colour, colorsubsampling="420"),
            simplejpeg.encode_jpeg(grey, colorspace="GRAY"),
        ]
        try:
            decoded = self._decode(encoded)
        except RuntimeError as error:  # otherwise every image would silently be decoded on a CPU
            raise RunError(
                f"preprocess.mode=cuda: {self._device} cannot decode JPEGs ({error}); use preprocess.mode=fast"
            ) from error
        for content, found in zip(encoded, decoded):
            difference = found.permute(1, 2, 0).cpu().numpy().astype(int) - simplejpeg.decode_jpeg(content)
            if np.abs(difference).mean() > MAX_MEAN_DIFFERENCE:
                raise RunError(
                    f"preprocess.mode=cuda: {self._device} decodes JPEGs to other pixels than a CPU; "
                    f"use preprocess.mode=fast"
                )
        self._supported = {coding_of(content) for content in encoded}

    def _decode_alone(self, content: bytes) -> torch.Tensor | None:
        """Decode one file, after freeing the memory that only torch's allocator can use. None if it is rejected."""
        self._accelerator.release_cached_memory()
        try:
            return self._resize_and_crop(self._decode([content])[0])
        except RuntimeError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning(
                    "%s could not decode an image; decoding it and others like it on the CPU, without further "
                    "warnings: %s",
                    self._device,
                    error,
                )
        return None

    def _decode(self, contents: Sequence[bytes]) -> list[torch.Tensor]:
        encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        # nvJPEG writes on its own stream, to memory that kernels queued on the current stream may still read.
        self._accelerator.synchronize_stream()
        decoded: list[torch.Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        return decoded

    def _resize_and_crop(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transform 3 x height x width of any size to height x width x 3 of the model's input size."""
        height, width = pixels.shape[1:]
        resized_width, resized_height = self._transform.resized_size(width, height, self._max_pixels)
        if (resized_width, resized_height) != (width, height):
            resized = interpolate(
                pixels[None].float(),  # not implemented for uint8 on GPUs
                size=(resized_height, resized_width),
                mode=self._transform.interpolation,
                antialias=True,
            )
            pixels = resized[0].round_().clamp_(0, 255).to(torch.uint8)
        crop_height, crop_width = self._transform.input_size
        left, top = round((resized_width - crop_width) / 2.0), round((resized_height - crop_height) / 2.0)
        return pixels[:, top : top + crop_height, left : left + crop_width].permute(1, 2, 0)

    def _decode_on_cpu(self, content: bytes) -> torch.Tensor | ItemError:
        try:
            return torch.from_numpy(preprocess_fast(content, self._transform, self._max_pixels)[2]).to(self._device)
        except ItemError as error:
            return error
