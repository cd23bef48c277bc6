"""Restart policy for failed training workers. Does not import torch, which Ray Train's controller does not need."""

import logging
import traceback
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from pipelines.errors import RequestError, RunError, root_cause
from pipelines.runtime.logs import log_to_stderr

log = logging.getLogger(__name__)

# Errors of our code or of a library that it calls. A restart would raise them again, unlike a lost worker, a lost
# connection or a store that did not answer.
CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)
PACKAGE = Path(__file__).parents[1]


def as_fatal(error: Exception) -> Exception:
    """Convert an error that a restart cannot fix to a `RunError` that names the line of our code.

    Other errors, and those that end the run already, are returned unchanged.
    """
    if isinstance(error, RequestError) or not isinstance(error, CODE_ERRORS):
        return error
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    place = f" ({Path(frames[-1].filename).relative_to(PACKAGE.parent)}, line {frames[-1].lineno})" if frames else ""
    return RunError(f"{root_cause(error)}{place}")


class RestartPolicy(UserCallback):
    """Ray Train callback that logs why a worker failed, and ends the run if a restart would fail in the same way.

    Ray Train restarts the workers after any error, up to `FailureConfig.max_failures` times. An error raised by a
    callback in the controller ends the run at once, and `fit` raises it as `controller_failure`.
    """

    def __init__(self) -> None:
        self._last_reason: str | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Forget the last error. After progress, the same error may have another cause."""
        self._last_reason = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Handle the errors of the workers, by rank, before Ray Train decides on a restart.

        Raises:
            RequestError: A worker rejected the request.
            RunError: A restart would fail too.
        """
        for error in worker_exceptions.values():
            if isinstance(error, RequestError | RunError):
                raise error
        rank = min(worker_exceptions)
        reason = root_cause(worker_exceptions[rank])
        # Only plain RuntimeErrors count: Ray reports all lost workers with the same text.
        if type(worker_exceptions[rank]) is RuntimeError and reason == self._last_reason:
            raise RunError(f"{reason} (the same error occurred again after a restart)")
        self._last_reason = reason
        log_to_stderr()
        log.warning("training worker %d failed; restarting if failure.max_failures allows: %s", rank, reason)
