"""Retries of failed requests with exponential backoff, and a limit on requests in flight that adapts to throttling."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import tenacity
from obstore.exceptions import GenericError

from pipelines.storage import s3

Result = TypeVar("Result")


class Retried(NamedTuple):
    """A kind of error that is retried: its pattern, our words for it, and why another attempt may succeed."""

    pattern: str
    words: str
    reason: str


RETRIED = (
    Retried(r"status code: (429|503)", "the store asks for fewer requests", "it divides its load anew meanwhile"),
    Retried(r"status code: (408|500|502|504)", "the store had a fault of its own", "it has other machines"),
    Retried(r"kind: Timeout", "no answer in time", "the next connection leads to another machine"),
    Retried(r"kind: Connect", "no connection to the store", "it is restarted, or the network is"),
    Retried(r"HTTP error: ", "the connection broke off", "only this one did"),
)
TRANSIENT = re.compile("|".join(kind.pattern for kind in RETRIED))
THROTTLED = re.compile(RETRIED[0].pattern)
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
# Looks like "kind: Connect", but the next attempt meets the same certificate.
CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
# What differs between equal failures: obstore's and other clients' URLs, durations and request ids.
REQUEST_MADE = re.compile(r".*Error performing \S+ \S+ in \S+ - ", re.DOTALL)
S3_ERROR = re.compile(r"<Code>([^<]+)</Code>(?:.*?<Message>([^<]*)</Message>)?", re.DOTALL)
VARYING = (
    (re.compile(r",? ?url='[^']*'|,? ?url=\S+"), ""),
    (re.compile(r"\w+://[^\s'\")]+"), "URL"),
    (re.compile(r"\b\d+(\.\d+)? ?(ns|µs|us|ms|s|seconds)\b"), "some time"),
    (re.compile(r"(?i)\b(request[ _-]?id|host[ _-]?id)\b\W*[\w/+=-]+"), "request id"),
    (re.compile(r"\b(?=\w*\d)[0-9A-Fa-f-]{12,}\b|\b(?=[A-Z]*\d)[0-9A-Z]{14,}\b"), "ID"),
)
# Exponential backoff with full jitter, as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015). An
# endpoint that is gone for half a minute costs no image.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
GIVE_UP_AFTER_S = 120.0
# A request of 100 KB takes 10 to 50 ms on S3, mostly waiting: 32 in flight are several hundred images a second, more
# than one decoding core takes.
MAX_IN_FLIGHT = 32
# Ignore throttling of requests that were already in flight.
SLOW_DOWN_EVERY_S = 1.0


class RequestLimit:
    """Limit on the requests of this process in flight: halved when the store throttles, then slowly raised.

    Additive increase, multiplicative decrease, as in TCP's congestion control (RFC 5681). Processes share nothing: each
    is throttled by itself.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._in_flight = 0
        self._slowed_at = -SLOW_DOWN_EVERY_S
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a slot, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < int(self.limit))
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    def slow_down(self) -> None:
        """Halve the limit after a throttled request."""
        with self._changed:
            if time.monotonic() - self._slowed_at >= SLOW_DOWN_EVERY_S:
                self._slowed_at = time.monotonic()
                self.limit = max(1.0, self.limit / 2)

    def speed_up(self) -> None:
        """Raise the limit a little after an answer."""
        with self._changed:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)
            self._changed.notify()


REQUESTS = RequestLimit(MAX_IN_FLIGHT)


class Retries:
    """Sends requests, and retries those that failed for a transient reason.

    Attributes:
        num: number of retries so far.
    """

    def __init__(self) -> None:
        self.num = 0

    def send(self, request: Callable[[], Result]) -> Result:
        """Return the result of a request.

        Args:
            request: sends it. One to S3 gets its client from `s3_store` each time, since a bucket may turn out to be in
                another region; the request is then sent there at once.

        Raises:
            GenericError: the error of the last attempt.
        """
        first_sent_at: list[float] = []
        results: list[Result] = []

        def attempt() -> Exception | None:
            try:
                with REQUESTS.slot():
                    first_sent_at.append(time.monotonic())
                    results.append(s3.in_region_of_bucket(lambda: _send(request)))
            except Exception as error:
                if not is_transient(error):
                    raise
                return error.with_traceback(None)
            return None

        # tenacity's objects refer to each other, so what they hold stays in memory until the garbage collector's next
        # pass: 5 GB of objects of 64 MiB, by a result or by the traceback of an error. They hold neither here.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda error: error is not None),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            # Time spent waiting for a slot does not count.
            stop=lambda _: time.monotonic() - first_sent_at[0] >= GIVE_UP_AFTER_S,
            before_sleep=self._count,
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        if error := retrying(attempt):
            raise error
        return results.pop()

    def _count(self, _: tenacity.RetryCallState) -> None:
        self.num += 1


def is_transient(error: BaseException) -> bool:
    """Return whether another attempt may succeed, by the error of obstore or botocore."""
    if isinstance(error, GenericError):
        text = str(error)
        return bool(TRANSIENT.search(text)) and not CERTIFICATE.search(text)
    from botocore.exceptions import ClientError, ConnectionError, SSLError

    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in RETRIED_STATUS
    return isinstance(error, ConnectionError) and not isinstance(error, SSLError)


def in_words(error: BaseException) -> str:
    """Return the reason why a request failed, without URL, request id and duration: equal failures read alike."""
    text = str(error)
    if refused := CERTIFICATE.search(text):
        return (
            f"the certificate of the store is not trusted ({refused.group(1)}); for a private CA, AWS_CA_BUNDLE names "
            "the file of its certificate"
        )
    for kind in RETRIED:
        if re.search(kind.pattern, text):
            return f"{kind.words}, for {GIVE_UP_AFTER_S:.0f} s"
    return f"{type(error).__name__}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return error.strerror
    text = REQUEST_MADE.sub("", str(error).partition("\n\nDebug source")[0])
    if said := S3_ERROR.search(text):
        text = f"{said.group(1)}: {said.group(2)}" if said.group(2) else said.group(1)
    text = text.strip().partition("\n")[0]
    for pattern, words in VARYING:
        text = pattern.sub(words, text)
    return text


def _send(request: Callable[[], Result]) -> Result:
    try:
        result = request()
    except GenericError as error:
        if THROTTLED.search(str(error)):
            REQUESTS.slow_down()
        raise
    except BaseException as error:
        # A panic of obstore's Rust code is a BaseException, which would end the thread or the task.
        if type(error).__name__ == "PanicException":
            raise GenericError(f"obstore failed: {error}") from None
        raise
    REQUESTS.speed_up()
    return result
