"""What can go wrong: with the request, with the run, and with a single image."""

from typing import Literal


class RequestError(ValueError):
    """What was asked for is wrong: bad config, missing input, weights not found. Exit status 2."""


class DamagedFileError(RequestError):
    """A file of an output is not what a job wrote there."""


class RunError(RuntimeError):
    """The request was right, but the run failed. Exit status 1."""


ErrorKind = Literal[
    "not_found",  # listed, but gone when it was fetched
    "access_denied",  # the store or the file system refuses to hand it out
    "timeout",  # the store did not answer in time, retries included
    "storage_error",  # any other failure of the store, retries included
    "too_many_bytes",  # larger than input.max_bytes
    "empty",  # an object of no bytes
    "not_an_image",  # no decoder knows the bytes
    "truncated",  # an image that ends too early
    "corrupt",  # an image whose content contradicts itself
    "too_many_pixels",  # larger than preprocess.max_pixels
    "too_slow",  # decoding would take, or has taken, far longer than the image's size lets expect
    "unsupported",  # a known format that no decoder reads, or a variant that its decoder does not read
    "not_finite",  # the model answers with infinities, as in float16, or with no numbers
]
"""The closed set of `error_kind` in `failed-*.parquet`."""

TRANSIENT_KINDS: tuple[ErrorKind, ...] = ("timeout", "storage_error")
"""Those that say nothing of the image: another day it may be had."""


class ItemError(Exception):
    """One image failed; the run goes on. Becomes one row of `failed-*.parquet`."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: ErrorKind = kind
        self.message = message


def root_cause(error: BaseException) -> str:
    """The last line of the innermost error that says anything; Ray Data ends its chains with an empty one."""
    cause: BaseException | None = error
    said = type(error).__name__
    while cause is not None:
        # A traceback of another process is text, the innermost error first.
        innermost = str(cause).partition("The above exception was the direct cause")[0]
        lines = [line.strip() for line in innermost.splitlines() if line.strip()]
        said = f"{type(cause).__name__}: {lines[-1]}" if lines else said
        cause = cause.__cause__ or getattr(cause, "cause", None)  # the second is Ray's
    return said
