"""What can go wrong: with the request, with the run, and with a single image."""

import re
from collections.abc import Iterator
from typing import Literal

ANSI = re.compile(r"\x1b\[[0-9;]*m")
# First line of a traceback, as Python and Ray print it.
HEADER = re.compile(r"^.*(?:Traceback \(most recent call last\):|ray::.*\(pid=.*\))$", re.MULTILINE)
# What stands between the tracebacks of a chain of errors.
LINKS = re.compile(
    r"\n\n(?:The above exception was the direct cause of|During handling of the above exception, another)"
    r"[^\n]*exception[^\n]*:?\n"
)
# Errors by which Ray 2.60 hands on those of a task.
WRAPPER = re.compile(r"(?:UserCodeException|RayDataUserCodeException|RayTaskError|SystemException)\b")
OWN_ERRORS = ("RequestError", "RunError", "LeaseLostError")  # their messages are whole sentences
QUALIFIED = re.compile(r"[A-Za-z_][\w.]*")
# In the name of Ray Data's operator: the function or class that a stage runs.
STAGE = re.compile(r"MapBatches\((\w+)\)")
# Enough for the reason and a file's name; some libraries put pages into an error.
MAX_CAUSE_LENGTH = 1000


class RequestError(ValueError):
    """What was asked for is wrong: bad config, missing input, weights not found. Exit status 2."""


class DamagedFileError(RequestError):
    """A file of an output is not what a job wrote there."""


class RunError(RuntimeError):
    """The request was right, but the run failed. Exit status 1."""


ErrorKind = Literal[
    "not_found",  # listed, but gone when it was fetched
    "changed",  # no longer the object that was listed: its etag is another one
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
    """Describe a failure in one line: the stage, what its code raised, and the innermost cause.

    Ray carries the errors of other processes as the text of their tracebacks, the innermost first, and wraps them in
    errors of its own that say nothing of the reason.

    Args:
        error: what was caught, such as `ray.exceptions.RayTaskError` or an entry of `TrainingFailedError`.

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
        found = found.__cause__ or getattr(found, "cause", None)  # the second is Ray's


def _text_of(error: BaseException) -> str:
    """The error with its type, or the traceback of another process that it carries."""
    text = ANSI.sub("", str(error)).strip()
    return text if HEADER.search(text) else f"{type(error).__name__}: {text}" if text else ""


def _raised_by_user(text: str) -> list[str]:
    """The errors in a text, the innermost first, without tracebacks and without Ray's wrappers."""
    messages = (_message_of(section) for section in LINKS.split(text))
    return [message for message in messages if message and not WRAPPER.match(message)]


def _message_of(section: str) -> str:
    """The last error of a section: `Type: message` in one line, without its module."""
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
