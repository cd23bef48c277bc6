"""Request retries with exponential backoff, and a limit on requests in flight that adapts to throttling."""

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
    """Kind of error that is retried.

    Attributes:
        pattern: Regular expression that its text matches.
        words: Description for users.
        reason: Why another attempt may succeed.
    """

    pattern: str
    words: str
    reason: str


RETRIED = (
    Retried(r"status code: (429|503)", "the store throttled the request", "the store rebalances its load meanwhile"),
    Retried(r"status code: (408|500|502|504)", "the store had a server error", "another server may answer"),
    Retried(r"kind: Timeout", "the request timed out", "the next connection may reach another server"),
    Retried(r"kind: Connect", "could not connect to the store", "the store or the network may be restarting"),
    Retried(r"HTTP error: ", "the connection was lost", "only this connection is affected"),
)
TRANSIENT = re.compile("|".join(kind.pattern for kind in RETRIED))
THROTTLED = re.compile(RETRIED[0].pattern)
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
# A rejected certificate also reads "kind: Connect", but the next attempt would meet the same certificate.
CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
# Parts of a message that vary between equal failures: URLs, durations and request ids of obstore and other clients.
REQUEST_MADE = re.compile(r".*Error performing \S+ \S+ in \S+ - ", re.DOTALL)
S3_ERROR = re.compile(r"<Code>([^<]+)</Code>(?:.*?<Message>([^<]*)</Message>)?", re.DOTALL)
VARYING = (
    (re.compile(r",? ?url='[^']*'|,? ?url=\S+"), ""),
    (re.compile(r"\w+://[^\s'\")]+"), "URL"),
    (re.compile(r"\b\d+(\.\d+)? ?(ns|µs|us|ms|s|seconds)\b"), "DURATION"),
    (re.compile(r"(?i)\b(request[ _-]?id|host[ _-]?id)\b\W*[\w/+=-]+"), "request id"),
    (re.compile(r"\b(?=\w*\d)[0-9A-Fa-f-]{12,}\b|\b(?=[A-Z]*\d)[0-9A-Z]{14,}\b"), "ID"),
)
# Exponential backoff with full jitter, as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015). An
# endpoint that is down for half a minute fails no image.
MIN_WAIT_S, MAX_WAIT_S = 0.2, 15.0
GIVE_UP_AFTER_S = 120.0
# A request of 100 KB takes 10 to 50 ms on S3, mostly waiting: 32 in flight give several hundred images per second,
# more than one core decodes.
MAX_IN_FLIGHT = 32
# Ignore throttling of requests that were already in flight.
THROTTLE_COOLDOWN_S = 1.0


class RequestLimit:
    """Limit on the requests of this process in flight: halved when the store throttles, then slowly raised.

    The limit follows additive increase, multiplicative decrease, as in TCP congestion control (RFC 5681). Processes do
    not share it: each reacts to its own throttled requests.
    """

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.limit = float(max_in_flight)
        self._num_in_flight = 0
        self._decreased_at = -THROTTLE_COOLDOWN_S
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a slot and hold it for the `with` block."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_in_flight < int(self.limit))
            self._num_in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_in_flight -= 1
                self._changed.notify()

    def decrease(self) -> None:
        """Halve the limit after a throttled request."""
        with self._changed:
            if time.monotonic() - self._decreased_at >= THROTTLE_COOLDOWN_S:
                self._decreased_at = time.monotonic()
                self.limit = max(1.0, self.limit / 2)

    def increase(self) -> None:
        """Raise the limit a little after a successful request."""
        with self._changed:
            self.limit = min(float(self.max_in_flight), self.limit + 1 / self.limit)
            self._changed.notify()


REQUESTS = RequestLimit(MAX_IN_FLIGHT)


class Retries:
    """Sender of requests that retries transient failures.

    Attributes:
        num: Number of retries so far.
    """

    def __init__(self) -> None:
        self.num = 0

    def send(self, request: Callable[[], Result]) -> Result:
        """Send a request, with retries, and return its result.

        Args:
            request: Callable that sends the request. For S3 it must get its client from `s3_store` on every call: if
                the bucket turns out to be in another region, the request is sent there at once.

        Raises:
            GenericError: The last attempt failed.
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

        # tenacity's objects form reference cycles, so whatever they reference stays in memory until the garbage
        # collector runs: 5 GB for objects of 64 MiB, through a result or the traceback of an error. `attempt` therefore
        # hands them neither.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda error: error is not None),
            wait=tenacity.wait_random_exponential(multiplier=MIN_WAIT_S, max=MAX_WAIT_S),
            # The time spent waiting for the first slot does not count.
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
    """Return whether an error of obstore or botocore is transient, so that another attempt may succeed."""
    if isinstance(error, GenericError):
        text = str(error)
        return bool(TRANSIENT.search(text)) and not CERTIFICATE.search(text)
    from botocore.exceptions import ClientError, ConnectionError, SSLError

    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in RETRIED_STATUS
    return isinstance(error, ConnectionError) and not isinstance(error, SSLError)


def describe_error(error: BaseException) -> str:
    """Describe why a request failed, in one line.

    URLs, request ids and durations are left out, so that equal failures have equal descriptions and can be counted.
    """
    text = str(error)
    if refused := CERTIFICATE.search(text):
        return (
            f"the certificate of the store is not trusted ({refused.group(1)}); for a private CA, set AWS_CA_BUNDLE to "
            "the file of its certificate"
        )
    for kind in RETRIED:
        if re.search(kind.pattern, text):
            return f"{kind.words}; gave up after {GIVE_UP_AFTER_S:.0f} s of retries"
    return f"{type(error).__name__}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return error.strerror
    text = REQUEST_MADE.sub("", str(error).partition("\n\nDebug source")[0])
    if s3_error := S3_ERROR.search(text):
        text = f"{s3_error.group(1)}: {s3_error.group(2)}" if s3_error.group(2) else s3_error.group(1)
    text = text.strip().partition("\n")[0]
    for pattern, words in VARYING:
        text = pattern.sub(words, text)
    return text


def _send(request: Callable[[], Result]) -> Result:
    try:
        result = request()
    except GenericError as error:
        if THROTTLED.search(str(error)):
            REQUESTS.decrease()
        raise
    except BaseException as error:
        # A panic in obstore's Rust code is a BaseException, which would kill the thread or the task.
        if type(error).__name__ == "PanicException":
            raise GenericError(f"obstore failed: {error}") from None
        raise
    REQUESTS.increase()
    return result
