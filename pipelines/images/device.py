"""JPEG to the model's input on a GPU: decoded by nvJPEG, as torchvision calls it, resized and cropped there.

Not measured on a GPU yet. On a CPU device the same steps run by libjpeg-turbo. torchvision deprecates its decoders
since 0.29, in favour of TorchCodec.
"""

import logging
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.errors import ItemError, RunError
from pipelines.images.fast import preprocess_fast
from pipelines.images.transform import EvalTransform

log = logging.getLogger(__name__)

# Between decoders, of values up to 255: they round chroma and its upsampling in their own ways.
MAX_MEAN_DIFFERENCE = 4


class DeviceDecoder:
    """Decodes batches on one device; what its decoder refuses is done as `fast` does it, on the CPU.

    Args:
        transform: the eval transform.
        max_pixels: largest image decoded, and largest size resized to.
        device: where.

    Raises:
        RunError: it decodes no JPEG, or to other pixels, or this torchvision does not have it do so.
    """

    def __init__(self, transform: EvalTransform, max_pixels: int, device: torch.device) -> None:
        self._transform, self._max_pixels, self._device = transform, max_pixels, device
        self._has_refused = False
        self._try_out()

    def __call__(self, contents: Sequence[bytes]) -> list[torch.Tensor | ItemError]:
        """Files that `size_for_device` has a size for, to height x width x 3 uint8 on the device, or to the reason."""
        try:
            return [self._fit(pixels) for pixels in self._decode(contents)]
        except RuntimeError:
            pass  # one of them is refused, and the error does not say which; or they are too many for the memory
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # decoding goes on, into memory that is free now
        if len(contents) == 1:
            return [self._decode_alone(contents[0])]
        half = len(contents) // 2
        return [*self(contents[:half]), *self(contents[half:])]

    def _try_out(self) -> None:
        """Decode two pictures of the kinds to come, in colour with halved chroma and in grey, and look at them."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 256))
        colour = np.stack([ramp, ramp.T, ramp[::-1]], axis=2)
        grey = np.ascontiguousarray(ramp[..., None])
        encoded = [
            simplejpeg.encode_jpeg(colour, colorsubsampling="420"),
            simplejpeg.encode_jpeg(grey, colorspace="GRAY"),
        ]
        try:
            decoded = self._decode(encoded)
        except RuntimeError as error:  # every image would come to be decoded on a CPU, without a word
            raise RunError(f"preprocess.mode=cuda: {self._device} decodes no JPEG: {error}") from error
        for content, found in zip(encoded, decoded):
            difference = found.permute(1, 2, 0).cpu().numpy().astype(int) - simplejpeg.decode_jpeg(content)
            if np.abs(difference).mean() > MAX_MEAN_DIFFERENCE:
                raise RunError(f"preprocess.mode=cuda: {self._device} decodes JPEGs to other pixels than a CPU")

    def _decode_alone(self, content: bytes) -> torch.Tensor | ItemError:
        """Once more, with the memory that torch keeps for later and nvJPEG cannot ask it for; or by the CPU."""
        torch.cuda.empty_cache()
        try:
            return self._fit(self._decode([content])[0])
        except RuntimeError as error:
            if not self._has_refused:
                self._has_refused = True
                log.warning("%s refuses an image, the first of those that a CPU decodes: %s", self._device, error)
        return self._decode_on_cpu(content)

    def _decode(self, contents: Sequence[bytes]) -> list[torch.Tensor]:
        encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        if self._device.type == "cuda":
            # nvJPEG writes on a stream of its own, at once, into memory that kernels queued on this one may still read.
            torch.cuda.current_stream(self._device).synchronize()
        decoded: list[torch.Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        return decoded

    def _fit(self, pixels: torch.Tensor) -> torch.Tensor:
        """3 x height x width of any size to the model's input size."""
        height, width = pixels.shape[1:]
        resized_width, resized_height = self._transform.resized_size(width, height, self._max_pixels)
        if (resized_width, resized_height) != (width, height):
            resized = interpolate(  # no uint8 on GPUs
                pixels[None].float(),
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
