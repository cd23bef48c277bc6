"""Predict: uint8 images to top-k and embedding, as a replica does it. Rows 1:1."""

import contextlib
import logging
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

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
from pipelines.runtime import metrics
from pipelines.runtime.cache import use_private_compiler_cache

log = logging.getLogger(__name__)


class Predictor:
    """One replica of the model.

    Every forward pass has the same shape: a batch that is not full is padded with black images. On one kind of machine
    (a C++ compiler is part of the kind) a row's result is then independent of its neighbours, bit for bit; on a GPU, as
    long as its memory holds the batches.

    On CPUs a replica predicts several batches at the same time, each in one thread, its caller's: two threads that
    share a batch wait for each other at every layer, which costs a tenth, and more where others want the cores. A model
    compiled for int8 predicts one batch at a time, in all threads.

    Args:
        bundle: whose module is the predictor's from now on.
        options: how to run it.
    """

    def __init__(self, bundle: ModelBundle, options: PredictOptions) -> None:
        torch.set_num_threads(options.num_threads if isinstance(bundle.module, bytes) else 1)
        torch.backends.cudnn.allow_tf32 = False  # who asks for float32 gets it
        self.options = options
        self.batch_size = options.batch_size
        self._accelerator = replica_accelerator(options.use_gpu)
        self.device = self._accelerator.device
        self.schema = predictions_schema(options.topk, bundle.num_features if options.embedding else 0)
        self._side_stream = self._accelerator.side_stream()
        self._load_pixels = PixelLoader(bundle.transform, options.max_pixels, self._accelerator)
        takes_turns = self._accelerator.runs_one_batch_at_a_time
        self._turn = threading.Lock() if takes_turns else contextlib.nullcontext()
        self.label_names = pa.array(bundle.label_names, pa.string())
        self.dtype = bundle.dtype
        self.forward = self._load_forward(bundle)

    def _load_forward(self, bundle: ModelBundle) -> Forward:
        module = bundle.module
        if isinstance(module, bytes):
            shape = (self.batch_size, *bundle.transform.input_size, 3)
            return compile_program(module, shape, self.options.num_threads)
        dtype: torch.dtype = getattr(torch, bundle.dtype)
        if not self._accelerator.supports(dtype):
            raise RunError(f"this GPU has no {bundle.dtype}: take float16, or another type of GPU")
        layout = memory_format_for(bundle.name, self.device)
        model = module.to(self.device, dtype).to(memory_format=layout)
        if self.device.type == "cpu" and not self.options.compile:
            pack_convolutions(model)
        normalize = Normalizer(bundle.transform.mean, bundle.transform.std).to(self.device)

        def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, features = model(normalize(images).to(dtype).contiguous(memory_format=layout))
            return logits, features

        # Without CUDA graphs: a batch of 256 keeps a GPU busy for longer than its kernels take to be launched.
        if not self.options.compile:
            return forward
        use_private_compiler_cache()
        return torch.compile(forward, dynamic=False)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn `IMAGES` into `predictions_schema`; carried columns and failed rows pass through."""
        batch, images = self._load_pixels(batch)
        with metrics.timed("forward"):
            results = self._predict_images(images) if len(images) else self._empty_results()
        if (used_bytes := self._accelerator.used_bytes()) is not None:
            metrics.record_gpu_memory(used_bytes)
        return self._join(*self._without_broken(batch, results))

    def _predict_images(self, images: torch.Tensor) -> pa.Table:
        """Batch by batch; where the GPU's memory does not hold one, in smaller ones from then on."""
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
            self._accelerator.release_cached_memory()  # after the except block, which holds the error
            self.batch_size = batch_size // 2
            log.warning("the GPU's memory holds no batch of %d: going on with %d", batch_size, self.batch_size)
        return pa.concat_tables(chunks)

    @torch.inference_mode()
    def _predict_batch(self, images: torch.Tensor, batch_size: int) -> pa.Table:
        """Up to batch_size x height x width x 3 to a table of `index`, `prob`, `label` and `embedding`."""
        num_images = len(images)
        metrics.count("ecaray_batch_images", num_images)
        metrics.count("ecaray_batch_places", batch_size)
        if num_images < batch_size:
            images = torch.cat([images, images.new_zeros(batch_size - num_images, *images.shape[1:])])
        uploaded = self._side_stream.upload(images)
        with self._turn:
            logits, features = self.forward(uploaded)
            download = self._accelerator.download(self._wanted(logits[:num_images], features[:num_images]))
        return self._columns(download.wait())

    def _wanted(self, logits: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
        """Probabilities and indices of the top-k, then the embedding: those of them that are asked for."""
        topk = list(logits.float().softmax(dim=-1).topk(self.options.topk)) if self.options.topk else []
        return topk + ([features.float()] if self.options.embedding else [])

    def _columns(self, results: list[NDArray[Any]]) -> pa.Table:
        columns: dict[str, pa.Array] = {}
        if self.options.topk:
            columns |= self._topk_columns(*results[:2])
        if self.options.embedding:
            values = results[-1]
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])
        return pa.table(columns)

    def _topk_columns(self, prob: NDArray[np.float32], index: NDArray[np.int64]) -> dict[str, pa.Array]:
        offsets = pa.array(np.arange(0, index.size + 1, self.options.topk), pa.int32())
        flat = pa.array(index.reshape(-1).astype(np.int32))
        return {
            "index": pa.ListArray.from_arrays(offsets, flat),
            "prob": pa.ListArray.from_arrays(offsets, pa.array(prob.reshape(-1))),
            "label": pa.ListArray.from_arrays(offsets, self.label_names.take(flat)),
        }

    def _without_broken(self, batch: pa.Table, results: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The batch with an error in each row whose result is not finite, and the results without these rows."""
        is_finite = np.ones(len(results), bool)
        for name in ("prob", "embedding"):
            if len(results) and name in results.column_names:
                values = results[name].combine_chunks().flatten().to_numpy()
                is_finite &= np.isfinite(values.reshape(len(results), -1)).all(axis=1)
        if is_finite.all():
            return batch, results
        ids = batch["id"].filter(pc.is_null(batch["error_kind"])).filter(pa.array(~is_finite)).to_pylist()
        error = ItemError("not_finite", f"the model's results are not finite in {self.dtype}")
        return with_errors(batch, dict.fromkeys(ids, error)), results.filter(pa.array(is_finite))

    def _empty_results(self) -> pa.Table:
        names = [name for name in self.schema.names if name not in IMAGES.names]
        return pa.schema([self.schema.field(name) for name in names]).empty_table()

    def _join(self, batch: pa.Table, results: pa.Table) -> pa.Table:
        # Position of each row's result; null, which `take` answers with null, for a failed row.
        is_good = pc.is_null(batch["error_kind"]).to_numpy()
        positions = pa.array(np.cumsum(is_good) - 1, mask=~is_good)
        columns = {name: results[name].take(positions) for name in results.column_names}
        columns |= {name: batch[name] for name in batch.column_names if name in self.schema.names}
        predictions = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        for name in batch.column_names:
            if name not in IMAGES.names:  # carried from the input
                predictions = predictions.append_column(batch.schema.field(name), batch[name])
        return predictions
