"""Retries against a faulty store, simulated by a proxy: which requests are retried, how often, and when they fail."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from obstore.exceptions import GenericError
from obstore.store import S3Store

from cluster.local.faulty_proxy import Faults, Proxy, faulty_proxy
from cluster.local.object_store import ObjectStore
from pipelines.errors import ItemError
from pipelines.outputs.writer import write_table
from pipelines.storage import bulk, retry, s3
from pipelines.storage.retry import RequestLimit

NUM_OBJECTS = 60
URIS = [f"s3://scratch/retry/{index}" for index in range(NUM_OBJECTS)]


@pytest.fixture(scope="module")
def contents(store: ObjectStore) -> list[bytes]:
    """Store objects of 20 kB, large enough for a response to be cut off, and return their contents."""
    contents = [bytes([index]) * 20_000 for index in range(NUM_OBJECTS)]
    for uri, content in zip(URIS, contents):
        bulk.store_object(uri, content)
    return contents


@pytest.fixture
def behind(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Faults], Proxy]]:
    """Return a function that puts a faulty proxy between this process and the store."""
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.5)
    with ExitStack() as stack:

        def put(faults: Faults) -> Proxy:
            proxy = stack.enter_context(faulty_proxy(store.endpoint, faults))
            for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
                monkeypatch.setitem(os.environ, name, proxy.endpoint)
            s3.reset()
            return proxy

        yield put
        s3.reset()


def fetch(uris: list[str]) -> tuple[list[bytes | ItemError], int]:
    found = sorted(bulk.fetch_many(uris, max_bytes=100_000))
    return [one.content for one in found], sum(one.num_retries for one in found)


@pytest.mark.parametrize("faults", [Faults(unavailable=0.4), Faults(reset=0.4), Faults(unavailable=0.2, reset=0.2)])
def test_failed_requests_are_retried_and_counted(
    faults: Faults, behind: Callable[[Faults], Proxy], contents: list[bytes]
) -> None:
    proxy = behind(faults)
    found, num_retries = fetch(URIS)
    assert found == contents
    assert num_retries == proxy.counts.total() - proxy.counts["none"] > 10


def test_stalled_response_is_cut_off_and_retried(
    behind: Callable[[Faults], Proxy], contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", timedelta(seconds=1))
    behind(Faults(stalled=0.1, stall_s=30))
    started = time.monotonic()
    found, num_retries = fetch(URIS)
    assert found == contents
    assert num_retries > 0
    assert time.monotonic() - started < 25


def test_short_outage_fails_no_request(behind: Callable[[Faults], Proxy], contents: list[bytes]) -> None:
    proxy = behind(Faults())
    proxy.is_gone = True
    threading.Timer(3, lambda: setattr(proxy, "is_gone", False)).start()
    found, num_retries = fetch(URIS[:8])
    assert found == contents[:8]
    assert num_retries >= 8


def test_permanent_errors_are_not_retried(behind: Callable[[Faults], Proxy], contents: list[bytes]) -> None:
    proxy = behind(Faults())
    found, num_retries = fetch(["s3://scratch/retry/absent", "s3://absent/x"])
    assert [one.kind for one in found if isinstance(one, ItemError)] == ["not_found", "not_found"]
    assert (num_retries, proxy.counts.total()) == (0, 2)


@pytest.mark.parametrize(
    ("faults", "kind", "words"),
    [
        (Faults(unavailable=1), "storage_error", "the store throttled the request; gave up after 3 s of retries"),
        (
            Faults(reset=1),
            "storage_error",
            "(the connection was lost|could not connect to the store); gave up after 3 s of retries",
        ),
        (Faults(stalled=1, stall_s=9), "timeout", "the request timed out; gave up after 3 s of retries"),
    ],
)
def test_exhausted_retries_describe_the_error(
    faults: Faults, kind: str, words: str, behind: Callable[[Faults], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "GIVE_UP_AFTER_S", 3.0)
    # On a busy machine, an answer may take a second, so a short timeout is for the store that does not answer at all.
    monkeypatch.setattr(s3, "READ_TIMEOUT", timedelta(seconds=0.6 if faults.stalled else 10))
    behind(faults)
    (found,), num_retries = fetch(URIS[:1])
    assert isinstance(found, ItemError)
    assert found.kind == kind
    assert re.fullmatch(words, found.message)
    assert num_retries > 0


def test_writes_and_column_reads_are_retried(behind: Callable[[Faults], Proxy], store: ObjectStore) -> None:
    behind(Faults(unavailable=0.3, reset=0.3))
    table = pa.table({"id": [1, 2], "uri": ["a", "b"]})
    written = [write_table("s3://scratch/retried", f"part-{index}.parquet", table, table.schema) for index in range(8)]
    assert sum(file.num_retries for file in written) > 0
    for file in written:
        found = bulk.read_columns(f"s3://scratch/retried/{file.name}", ["id"])
        assert found.equals(table.select(["id"]))
        assert len(bulk.read_object(f"s3://scratch/retried/{file.name}")) > 100


def test_request_limit_halves_when_throttled_and_recovers_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "THROTTLE_COOLDOWN_S", 0.0)
    limit = RequestLimit(32)
    for _ in range(3):
        limit.decrease()
    assert limit.limit == 4
    for _ in range(4):
        limit.increase()
    assert 4.5 < limit.limit <= 5
    for _ in range(9):
        limit.decrease()
    assert limit.limit == 1
    for _ in range(2000):
        limit.increase()
    assert limit.limit == 32


def test_time_spent_waiting_for_a_slot_does_not_count_toward_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "REQUESTS", RequestLimit(1))
    monkeypatch.setattr(retry, "GIVE_UP_AFTER_S", 0.3)
    monkeypatch.setattr(retry, "MIN_WAIT_S", 0.001)
    attempts = [0] * 4

    def send(index: int) -> None:
        def request() -> None:
            attempts[index] += 1
            time.sleep(0.1)
            if attempts[index] == 1:
                raise GenericError("HTTP error: once")

        retry.Retries().send(request)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, range(4)))
    assert attempts == [2] * 4


def test_simultaneous_throttled_requests_halve_the_limit_once() -> None:
    limit = RequestLimit(32)
    for _ in range(32):
        limit.decrease()
    assert limit.limit == 16


def test_requests_in_flight_never_exceed_the_limit() -> None:
    limit, lock, most, now = RequestLimit(3), threading.Lock(), [0], [0]

    def hold() -> None:
        with limit.slot():
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 3


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            "Generic S3 error: Error performing GET http://a:1/b/x.jpg in 33.9ms - Received redirect without LOCATION",
            "Generic S3 error: Error performing GET http://a:1/b/y.jpg in 2.1s - Received redirect without LOCATION",
            "GenericError: Received redirect without LOCATION",
        ),
        (
            "Generic S3 error: Error performing GET http://a/b/x in 1ms - Server returned non-2xx status code: "
            "400 Bad Request: <?xml version='1.0'?>\n<Error><Code>KMS.Disabled</Code><Message>The key is off.</Message>"
            "<RequestId>AAAABBBBCCCC1111</RequestId></Error>\n\nDebug source: 1",
            "Generic S3 error: Error performing GET http://a/b/y in 2ms - Server returned non-2xx status code: "
            "400 Bad Request: <?xml version='1.0'?>\n<Error><Code>KMS.Disabled</Code><Message>The key is off.</Message>"
            "<RequestId>DDDD</RequestId></Error>\n\nDebug source: 2",
            "GenericError: KMS.Disabled: The key is off.",
        ),
        (
            "no luck with https://host/a?b=c after 12.5 seconds, request id: 4f2a-9",
            "no luck with https://host/d after 0.3 seconds, request id: 77aa-1",
            "GenericError: no luck with URL after DURATION, request id",
        ),
    ],
)
def test_failures_that_differ_in_url_request_id_or_duration_read_alike(first: str, second: str, words: str) -> None:
    assert retry.describe_error(GenericError(first)) == retry.describe_error(GenericError(second)) == words


def test_description_of_a_file_error_omits_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.jpg") as error:
        os.open(tmp_path / "folder" / "a.jpg" / ("x" * 300), os.O_RDONLY)
    assert str(tmp_path) not in retry.describe_error(error.value)


def test_obstore_panic_fails_only_the_image(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # obstore's builder panics on an endpoint that is not a URL. `s3_store` refuses such endpoints earlier.
    def panic(bucket: str, **_: object) -> object:
        S3Store(bucket, endpoint="127.0.0.1:8333").get("x")
        raise AssertionError

    monkeypatch.setattr(bulk, "s3_store", panic)
    (found,) = bulk.fetch_many(["s3://scratch/x"], max_bytes=10)
    assert isinstance(found.content, ItemError)
    assert found.content.kind == "storage_error"
    assert found.content.message.startswith("GenericError: obstore failed")
