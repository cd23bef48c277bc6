"""Other attempts at requests that a store on a bad day did not answer, and fewer at a time where it asks for that."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import tenacity
from obstore.exceptions import GenericError

Result = TypeVar("Result")


class Retried(NamedTuple):
    """A kind of error that is tried again: what it looks like, our words for it, why another attempt may do better."""

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
# Exponential backoff with full jitter, as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015). An
# endpoint that is gone for half a minute costs no image.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
GIVE_UP_AFTER_S = 120.0
# A request of 100 KB takes 10 to 50 ms on S3, mostly waiting: 32 in flight are several hundred images a second, more
# than one decoding core takes.
MAX_IN_FLIGHT = 32
# What was in flight when the store first asked for fewer asks for no less.
SLOW_DOWN_EVERY_S = 1.0


class RequestLimit:
    """How many requests of this process may be in flight: half as many when the store asks for fewer, then slowly more.

    Additive increase, multiplicative decrease, as in TCP's congestion control (RFC 5681). Processes share nothing: each
    hears of the store by itself.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._in_flight = 0
        self._slowed_at = -SLOW_DOWN_EVERY_S
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a place, and hold it."""
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
        """The store asked for fewer."""
        with self._changed:
            if time.monotonic() - self._slowed_at >= SLOW_DOWN_EVERY_S:
                self._slowed_at = time.monotonic()
                self.limit = max(1.0, self.limit / 2)

    def speed_up(self) -> None:
        """It answered."""
        with self._changed:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)
            self._changed.notify()


REQUESTS = RequestLimit(MAX_IN_FLIGHT)


class Retries:
    """Sends requests, again where it is worth it.

    Attributes:
        num: attempts so far that were not the first of their request.
    """

    def __init__(self) -> None:
        self.num = 0

    def send(self, request: Callable[[], Result]) -> Result:
        """What a request returns.

        Raises:
            GenericError: of its last attempt.
        """
        first_sent_at: list[float] = []

        def attempt() -> Result:
            with REQUESTS.slot():
                first_sent_at.append(time.monotonic())
                return _send(request)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            # Waiting for a slot is no fault of the store's.
            stop=lambda _: time.monotonic() - first_sent_at[0] >= GIVE_UP_AFTER_S,
            before_sleep=self._count,
            reraise=True,
        )
        result: Result = retrying(attempt)
        return result

    def _count(self, _: tenacity.RetryCallState) -> None:
        self.num += 1


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may do better."""
    return isinstance(error, GenericError) and bool(TRANSIENT.search(str(error)))


def in_words(error: BaseException) -> str:
    """What became of a request, without addresses and request ids, so that equal failures read alike."""
    text = str(error)
    for kind in RETRIED:
        if re.search(kind.pattern, text):
            return f"{kind.words}, for {GIVE_UP_AFTER_S:.0f} s"
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def _send(request: Callable[[], Result]) -> Result:
    try:
        result = request()
    except GenericError as error:
        if THROTTLED.search(str(error)):
            REQUESTS.slow_down()
        raise
    REQUESTS.speed_up()
    return result
