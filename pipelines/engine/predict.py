"""Predict stage: uint8 images to top-k and embedding, in one replica. Rows map 1:1."""

import contextlib
import logging
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines.engine.options import PredictOptions
from pipelines.engine.pixels import PixelLoader, with_errors
from pipelines.engine.schema import IMAGES, predictions_schema
from pipelines.errors import ItemError, RunError
from pipelines.models.accelerators import replica_accelerator
from pipelines.models.bundle import ModelBundle
from pipelines.models.cpu.compiled import Forward, compile_program
from pipelines.models.cpu.packing import pack_convolutions
from pipelines.models.layout import memory_format_for
from pipelines.models.normalize import Normalizer
from pipelines.outputs.columns import floating_fields, values_of
from pipelines.runtime import metrics
from pipelines.runtime.cache import use_private_compiler_cache

log = logging.getLogger(__name__)


class Predictor:
    """One replica of the model.

    Every forward pass has the same shape, because partial batches are padded with black images. On machines of one kind
    (the C++ compiler included), a row's result is therefore bit-for-bit independent of the other rows in its batch. On
    a GPU, this holds as long as its memory is large enough for the batches.

    On CPUs, a replica predicts several batches concurrently, each in the single thread of its caller: two threads that
    shared a batch would wait for each other at every layer, which costs 10 %, and more on busy cores. A model compiled
    for int8 predicts one batch at a time, in all threads.

    Args:
        bundle: Model. The predictor takes ownership of its module and may modify it.
        options: Options of the replica.
    """

    def __init__(self, bundle: ModelBundle, options: PredictOptions) -> None:
        torch.set_num_threads(options.num_threads if isinstance(bundle.module, bytes) else 1)
        torch.backends.cudnn.allow_tf32 = False  # float32 has to mean float32
        self.options = options
        self.batch_size = options.batch_size
        self._accelerator = replica_accelerator(options.use_gpu)
        self.device = self._accelerator.device
        self._facts = bundle.facts()
        self.schema = predictions_schema(options.columns, self._facts)
        self._results_schema = pa.schema([field for field in self.schema if field.name not in IMAGES.names])
        self._side_stream = self._accelerator.side_stream()
        self._load_pixels = PixelLoader(bundle.transform, options.max_pixels, self._accelerator)
        is_exclusive = self._accelerator.runs_one_batch_at_a_time
        self._forward_lock = threading.Lock() if is_exclusive else contextlib.nullcontext()
        self.dtype = bundle.dtype
        self.forward = self._load_forward(bundle)

    def _load_forward(self, bundle: ModelBundle) -> Forward:
        module = bundle.module
        if isinstance(module, bytes):
            shape = (self.batch_size, *bundle.transform.input_size, 3)
            return compile_program(module, shape, self.options.num_threads)
        dtype: torch.dtype = getattr(torch, bundle.dtype)
        if not self._accelerator.supports(dtype):
            raise RunError(
                f"this GPU does not support {bundle.dtype}: set model.dtype to float16, or use another type of GPU"
            )
        layout = memory_format_for(bundle.name, self.device)
        model = module.to(self.device, dtype).to(memory_format=layout)
        if self.device.type == "cpu" and not self.options.compile:
            pack_convolutions(model)
        normalize = Normalizer(bundle.transform.mean, bundle.transform.std).to(self.device)

        def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, features = model(normalize(images).to(dtype).contiguous(memory_format=layout))
            return logits, features

        if not self.options.compile:
            return forward
        use_private_compiler_cache()
        # No CUDA graphs: a batch of 256 keeps the GPU busy for longer than it takes to launch its kernels.
        return torch.compile(forward, dynamic=False)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Convert `IMAGES` to `predictions_schema`. Carried columns and failed rows pass through."""
        batch, images = self._load_pixels(batch)
        with metrics.timed("forward"):
            results = self._predict_images(images) if len(images) else self._results_schema.empty_table()
        if (used_bytes := self._accelerator.used_bytes()) is not None:
            metrics.record_gpu_memory(used_bytes)
        return self._join(*self._fail_non_finite(batch, results))

    def _predict_images(self, images: torch.Tensor) -> pa.Table:
        """Predict batch by batch. If the GPU runs out of memory, halve the batch size for the rest of the run."""
        chunks: list[pa.Table] = []
        start = 0
        while start < len(images):
            batch_size = self.batch_size
            try:
                chunks.append(self._predict_batch(images[start : start + batch_size], batch_size))
                start += batch_size
                continue
            except RuntimeError as error:
                if batch_size == 1 or not self._accelerator.is_out_of_memory(error):
                    raise
            self._accelerator.release_cached_memory()  # after the except block, whose error keeps tensors alive
            self.batch_size = batch_size // 2
            log.warning(
                "GPU out of memory at batch size %d: continuing with %d (set compute.batch_size to avoid the retry)",
                batch_size,
                self.batch_size,
            )
        return pa.concat_tables(chunks)

    @torch.inference_mode()
    def _predict_batch(self, images: torch.Tensor, batch_size: int) -> pa.Table:
        """Predict one batch.

        Args:
            images: Images on the host or the device, uint8, up to batch_size x height x width x 3.
            batch_size: Number of images that the batch is padded to.

        Returns:
            Table with the columns of the options.
        """
        num_images = len(images)
        metrics.count("ecaray_batch_images", num_images)
        metrics.count("ecaray_batch_places", batch_size)
        if num_images < batch_size:
            images = torch.cat([images, images.new_zeros(batch_size - num_images, *images.shape[1:])])
        uploaded = self._side_stream.upload(images)
        with self._forward_lock:
            logits, features = self.forward(uploaded)
            computed = [columns.compute(logits[:num_images], features[:num_images]) for columns in self.options.columns]
            download = self._accelerator.download([tensor for tensors in computed for tensor in tensors])
        values = iter(download.wait())
        arrays: list[pa.Array] = []
        for columns, tensors in zip(self.options.columns, computed):
            arrays += columns.arrays([next(values) for _ in tensors], self._facts)
        return pa.Table.from_arrays(arrays, schema=self._results_schema)

    def _fail_non_finite(self, batch: pa.Table, results: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Return the batch with an error in each row whose result is not finite, and the results without these rows."""
        is_finite = np.ones(len(results), bool)
        for field in floating_fields(results.schema) if len(results) else ():
            values = np.concatenate([values_of(chunk) for chunk in results[field.name].chunks])
            is_finite &= np.isfinite(values.reshape(len(results), -1)).all(axis=1)
        if is_finite.all():
            return batch, results
        ids = batch["id"].filter(pc.is_null(batch["error_kind"])).filter(pa.array(~is_finite)).to_pylist()
        error = ItemError("not_finite", f"the model's results for this image are not finite in {self.dtype}")
        return with_errors(batch, dict.fromkeys(ids, error)), results.filter(pa.array(is_finite))

    def _join(self, batch: pa.Table, results: pa.Table) -> pa.Table:
        # Position of each row's result. A failed row has null, for which `take` returns null.
        is_good = pc.is_null(batch["error_kind"]).to_numpy()
        positions = pa.array(np.cumsum(is_good) - 1, mask=~is_good)
        columns = {name: results[name].take(positions) for name in results.column_names}
        columns |= {name: batch[name] for name in batch.column_names if name in self.schema.names}
        predictions = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        for name in batch.column_names:
            if name not in IMAGES.names:  # a column carried over from the input
                predictions = predictions.append_column(batch.schema.field(name), batch[name])
        return predictions
