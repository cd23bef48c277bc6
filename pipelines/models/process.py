"""Separate process that resolves and prepares the model.

Importing torch and timm takes longer than anything else that a driver does before Ray starts. In a separate process,
the imports overlap with the driver's requests to the stores, and the preparation with the start of Ray. The driver
itself does not need torch or timm.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.config.sections import ModelConfig, PreprocessConfig
from pipelines.errors import RequestError, RunError
from pipelines.runtime.garbage_collector import paused_gc
from pipelines.runtime.logs import SafeStream, log_to_stderr

if TYPE_CHECKING:
    from pipelines.models.bundle import ModelFacts


class ModelProcess:
    """Handle of the process, which starts immediately.

    The process ends with the `with` block, or with the process that started it.

    Attributes:
        pid: Id of the process.
    """

    def __init__(self, model: ModelConfig, preprocess: PreprocessConfig) -> None:
        self._connection, child_end = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(child_end.fileno())],
            pass_fds=(child_end.fileno(),),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        child_end.close()
        self.pid = self._process.pid
        self._connection.send((model, preprocess))
        self._receiver = ThreadPoolExecutor(1)
        self._facts = self._receiver.submit(self._receive)
        if model.dtype == "int8":
            self._quantized = self._receiver.submit(self._receive)
        # Start to receive now: the bundle is larger than the pipe's buffer, so the process blocks until it is read.
        self._bundle = self._receiver.submit(self._receive)

    def facts(self) -> "ModelFacts":
        """Wait for the facts about the model, and return them.

        Raises:
            RequestError: The weights cannot be loaded, or do not fit the model or the image size.
            RunError: The process died.
        """
        facts: ModelFacts = self._facts.result()
        return facts

    def quantized_facts(self, images: NDArray[np.uint8]) -> "ModelFacts":
        """Quantize the model, and return its facts. An int8 model has no bundle before.

        Args:
            images: Images of the input, num_images x H x W x 3, uint8.

        Raises:
            RequestError: The model cannot be quantized, or the result is too far from float32.
            RunError: The process died.
        """
        with contextlib.suppress(ConnectionError):  # if the process died, its pending answer says why
            self._connection.send(images)
        facts: ModelFacts = self._quantized.result()
        return facts

    def pickled_bundle(self) -> bytes:
        """Wait for the pickled `ModelBundle` for the replicas, and return it.

        Raises:
            RunError: The process died.
        """
        pickled: bytes = self._bundle.result()
        return pickled

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RunError(
                f"the process that loads the model died with status {self._process.wait()}: run the same command "
                "again, with more memory if the status is -9"
            ) from None
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def __enter__(self) -> "ModelProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._receiver.shutdown()
        self._connection.close()


def serve(connection: Connection) -> None:
    """Send a `ModelProcess` the facts or an error to raise, and then the bundle."""
    with paused_gc():
        from pipelines.models.resolve import prepare_bundle, resolve_bundle

    model, preprocess = connection.recv()
    try:
        bundle = resolve_bundle(model, preprocess)
    except RequestError as error:
        connection.send(error)
        return
    connection.send(bundle.facts())
    if model.dtype == "int8":
        from pipelines.models.cpu.int8 import quantize_bundle

        try:
            bundle = quantize_bundle(bundle, connection.recv(), model.quantization)
        except RequestError as error:
            connection.send(error)
            return
        connection.send(bundle.facts())
    connection.send(pickle.dumps(prepare_bundle(bundle)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the driver handles it
    sys.stderr = cast("TextIO", SafeStream(sys.stderr))
    log_to_stderr()
    with contextlib.suppress(ConnectionError):  # the driver has ended
        serve(Connection(int(sys.argv[1])))
    os._exit(0)  # skip the teardown of torch, which takes half a second of a core that Ray needs to start
