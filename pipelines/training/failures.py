"""Which failures of a training worker are worth a restart. Imports no torch: Ray Train's controller needs none."""

import logging
import traceback
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from pipelines.errors import RequestError, RunError, root_cause
from pipelines.runtime.logs import log_to_stderr

log = logging.getLogger(__name__)

# Errors of code, of ours or of a library that it calls: they come back after a restart. Others may not: a worker or a
# connection that was lost, a store that did not answer.
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


def as_final(error: Exception) -> Exception:
    """Return what a worker raises: a `RunError` with the place in our code for an error that no restart can mend."""
    if isinstance(error, RequestError) or not isinstance(error, CODE_ERRORS):
        return error
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    place = f" ({Path(frames[-1].filename).relative_to(PACKAGE.parent)}, line {frames[-1].lineno})" if frames else ""
    return RunError(f"{root_cause(error)}{place}")


class RestartPolicy(UserCallback):
    """Logs why a worker failed, and ends the run where a restart would meet the same error again.

    Ray Train restarts the workers after any error up to `FailureConfig.max_failures` times. An error that a callback
    raises in its controller ends the run at once, and is the `controller_failure` of what `fit` raises.
    """

    def __init__(self) -> None:
        self._last_reason: str | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Note progress: after it, the same error may have another cause."""
        self._last_reason = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called with the errors of workers, by rank, before Ray Train decides on a restart.

        Raises:
            RequestError: a worker found the request wrong.
            RunError: a restart would fail too.
        """
        for error in worker_exceptions.values():
            if isinstance(error, RequestError | RunError):
                raise error
        rank = min(worker_exceptions)
        reason = root_cause(worker_exceptions[rank])
        # Without progress in between. Lost workers, as Ray reports them, all read the same.
        if type(worker_exceptions[rank]) is RuntimeError and reason == self._last_reason:
            raise RunError(f"{reason}, and the same after a restart")
        self._last_reason = reason
        log_to_stderr()
        log.warning("training worker %d failed, to be restarted if failure.max_failures allows: %s", rank, reason)
