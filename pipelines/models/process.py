"""A model, resolved and folded in a process of its own.

Importing torch and timm takes longer than anything else that a driver does before Ray starts. Beside the driver, it
costs no time while the driver looks at the stores, and folding none while Ray starts; the driver needs neither.
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
    """Starts at once; answers when it is asked. Ends with its `with` block, or with the process that started it.

    Attributes:
        pid: its process id.
    """

    def __init__(self, model: ModelConfig, preprocess: PreprocessConfig) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        theirs.close()
        self.pid = self._process.pid
        self._connection.send((model, preprocess))
        self._receiver = ThreadPoolExecutor(1)
        self._facts = self._receiver.submit(self._receive)
        if model.dtype == "int8":
            self._quantized = self._receiver.submit(self._receive)
        # At once: the bundle fills the pipe as soon as it is there, whatever the driver is doing then.
        self._bundle = self._receiver.submit(self._receive)

    def facts(self) -> "ModelFacts":
        """What was found.

        Raises:
            RequestError: the weights cannot be had, or do not fit the model or the image size.
            RunError: the process died.
        """
        facts: ModelFacts = self._facts.result()
        return facts

    def quantized_facts(self, images: NDArray[np.uint8]) -> "ModelFacts":
        """What is known of the model once it is quantized, which a model in int8 waits for.

        Args:
            images: num_images x H x W x 3 of the input.

        Raises:
            RequestError: it cannot be, or comes out too far from float32.
            RunError: the process died.
        """
        with contextlib.suppress(ConnectionError):  # it died: its answer, or that there is none, says why
            self._connection.send(images)
        facts: ModelFacts = self._quantized.result()
        return facts

    def pickled_bundle(self) -> bytes:
        """The `ModelBundle` as replicas take it.

        Raises:
            RunError: the process died.
        """
        pickled: bytes = self._bundle.result()
        return pickled

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RunError(f"the process that reads the model ended with status {self._process.wait()}") from None
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
    """Answer a `ModelProcess`: facts, or the error to raise, then the bundle."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the driver answers it
    sys.stderr = cast("TextIO", SafeStream(sys.stderr))
    log_to_stderr()
    with contextlib.suppress(ConnectionError):  # the driver has ended
        serve(Connection(int(sys.argv[1])))
    os._exit(0)  # torch's teardown takes half a second of a core that Ray needs to start
