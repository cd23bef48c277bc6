"""Errors: of the request, of the run, and of a single image."""

import re
from collections.abc import Iterator
from typing import Literal

ANSI = re.compile(r"\x1b\[[0-9;]*m")
# First line of a traceback, as printed by Python and Ray.
HEADER = re.compile(r"^.*(?:Traceback \(most recent call last\):|ray::.*\(pid=.*\))$", re.MULTILINE)
# Text between the tracebacks of chained exceptions.
LINKS = re.compile(
    r"\n\n(?:The above exception was the direct cause of|During handling of the above exception, another)"
    r"[^\n]*exception[^\n]*:?\n"
)
# Exceptions in which Ray 2.60 wraps the exception of a task.
WRAPPER = re.compile(r"(?:UserCodeException|RayDataUserCodeException|RayTaskError|SystemException)\b")
OWN_ERRORS = ("RequestError", "RunError", "LeaseLostError")  # their messages need no type in front
QUALIFIED = re.compile(r"[A-Za-z_][\w.]*")
# Name of a Ray Data operator, which contains the function or class that the stage runs.
STAGE = re.compile(r"MapBatches\((\w+)\)")
# Length limit in characters: enough for a reason and a file name. Some libraries put pages of text into an error.
MAX_CAUSE_LENGTH = 1000


class RequestError(ValueError):
    """Error in the request: bad config, missing input, weights not found. Exit status 2."""


class DamagedFileError(RequestError):
    """Damaged file of an output: its content is not what a job wrote."""


class RunError(RuntimeError):
    """Failure of a run whose request was valid. Exit status 1."""


ErrorKind = Literal[
    "not_found",  # the object was listed but no longer exists
    "changed",  # the object's etag differs from the listed one
    "access_denied",  # the store or the file system denies access
    "timeout",  # the store timed out, even after retries
    "storage_error",  # the store failed in any other way, even after retries
    "too_many_bytes",  # larger than input.max_bytes
    "empty",  # the object has no bytes
    "not_an_image",  # no decoder recognizes the bytes
    "truncated",  # the image data ends early
    "corrupt",  # the image data is inconsistent
    "too_many_pixels",  # larger than preprocess.max_pixels
    "too_slow",  # decoding would take, or has taken, far longer than expected for the image's size
    "unsupported",  # a known format without a decoder, or a variant that its decoder does not support
    "not_finite",  # the model returned NaN or infinity, as can happen in float16
]
"""Closed set of values of `error_kind` in `failed-*.parquet`."""

TRANSIENT_KINDS: tuple[ErrorKind, ...] = ("timeout", "storage_error")
"""Error kinds that are independent of the image, so that another attempt may succeed."""


class ItemError(Exception):
    """Failure of a single image, which becomes a row of `failed-*.parquet`. The run continues.

    Attributes:
        kind: Value of `error_kind`.
        message: Value of `error_message`.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: ErrorKind = kind
        self.message = message


def root_cause(error: BaseException) -> str:
    """Describe a failure in one line: the stage, the exception that its code raised, and the innermost cause.

    Ray transports exceptions of other processes as the text of their tracebacks, innermost first, wrapped in its own
    exceptions, which do not mention the reason.

    Args:
        error: Exception that was caught, such as `ray.exceptions.RayTaskError` or an entry of `TrainingFailedError`.

    Returns:
        One line without control sequences, such as
        `PartWriter: OSError: [Errno 28] No space left on device: '/out/part-000000000000.parquet'`.
    """
    texts = [_text_of(found) for found in _chain(error)]
    raised = [message for text in reversed(texts) for message in _raised_by_user(text)]
    stage = next((found[1] for found in map(STAGE.search, texts) if found), "")
    if not raised:
        return _shorten(type(error).__name__)
    outermost, innermost = raised[-1], raised[0]
    reason = innermost.partition(": ")[2] or innermost
    cause = "" if reason in outermost else f" ({innermost})"
    return _shorten(f"{stage}: {outermost}{cause}" if stage else f"{outermost}{cause}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or getattr(found, "cause", None)  # Ray sets `cause`


def _text_of(error: BaseException) -> str:
    """Return an exception as `Type: message`, or the traceback of another process that its message contains."""
    text = ANSI.sub("", str(error)).strip()
    return text if HEADER.search(text) else f"{type(error).__name__}: {text}" if text else ""


def _raised_by_user(text: str) -> list[str]:
    """Return the messages of the exceptions in a text, innermost first, without tracebacks and Ray's wrappers."""
    messages = (_message_of(section) for section in LINKS.split(text))
    return [message for message in messages if message and not WRAPPER.match(message)]


def _message_of(section: str) -> str:
    """Return the last exception of a section as a one-line `Type: message`, without the module of the type."""
    *_, frames = HEADER.split(section)
    lines = frames.strip("\n").splitlines()
    while lines and (lines[0].startswith("  ") or not lines[0].strip()):
        del lines[0]
    message = " ".join(" ".join(lines).split())
    kind, colon, rest = message.partition(":")
    if not QUALIFIED.fullmatch(kind):
        return message
    name = kind.rpartition(".")[2]
    return rest.strip() if rest and name in OWN_ERRORS else f"{name}{colon}{rest}"


def _shorten(line: str) -> str:
    return line if len(line) <= MAX_CAUSE_LENGTH else f"{line[:MAX_CAUSE_LENGTH]}..."
