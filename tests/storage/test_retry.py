"""A store on its bad days, by a proxy in front of it: what is asked again, how often, and what is given up."""

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
    """Objects of some kilobytes, so that an answer can break off."""
    contents = [bytes([index]) * 20_000 for index in range(NUM_OBJECTS)]
    for uri, content in zip(URIS, contents):
        bulk.store_object(uri, content)
    return contents


@pytest.fixture
def behind(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Faults], Proxy]]:
    """Puts a proxy between this process and the store."""
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.5)
    with ExitStack() as stack:

        def put(faults: Faults) -> Proxy:
            proxy = stack.enter_context(faulty_proxy(store.endpoint, faults))
            for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
                monkeypatch.setitem(os.environ, name, proxy.endpoint)
            s3.forget()
            return proxy

        yield put
        s3.forget()


def fetch(uris: list[str]) -> tuple[list[bytes | ItemError], int]:
    found = sorted(bulk.fetch_many(uris, max_bytes=100_000))
    return [one.content for one in found], sum(one.num_retries for one in found)


@pytest.mark.parametrize("faults", [Faults(unavailable=0.4), Faults(reset=0.4), Faults(unavailable=0.2, reset=0.2)])
def test_what_the_store_did_not_answer_is_asked_again_and_counted(
    faults: Faults, behind: Callable[[Faults], Proxy], contents: list[bytes]
) -> None:
    proxy = behind(faults)
    found, num_retries = fetch(URIS)
    assert found == contents
    assert num_retries == proxy.counts.total() - proxy.counts["none"] > 10


def test_a_stall_is_cut_off(
    behind: Callable[[Faults], Proxy], contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", timedelta(seconds=1))
    behind(Faults(stalled=0.1, stall_s=30))
    started = time.monotonic()
    found, num_retries = fetch(URIS)
    assert found == contents
    assert num_retries > 0
    assert time.monotonic() - started < 25


def test_an_endpoint_that_comes_back_costs_nothing(behind: Callable[[Faults], Proxy], contents: list[bytes]) -> None:
    proxy = behind(Faults())
    proxy.is_gone = True
    threading.Timer(3, lambda: setattr(proxy, "is_gone", False)).start()
    found, num_retries = fetch(URIS[:8])
    assert found == contents[:8]
    assert num_retries >= 8


def test_what_stays_wrong_is_asked_once(behind: Callable[[Faults], Proxy], contents: list[bytes]) -> None:
    proxy = behind(Faults())
    found, num_retries = fetch(["s3://scratch/retry/absent", "s3://absent/x"])
    assert [one.kind for one in found if isinstance(one, ItemError)] == ["not_found", "not_found"]
    assert (num_retries, proxy.counts.total()) == (0, 2)


@pytest.mark.parametrize(
    ("faults", "kind", "words"),
    [
        (Faults(unavailable=1), "storage_error", "the store asks for fewer requests, for 3 s"),
        (Faults(reset=1), "storage_error", "(the connection broke off|no connection to the store), for 3 s"),
        (Faults(stalled=1, stall_s=9), "timeout", "no answer in time, for 3 s"),
    ],
)
def test_what_is_given_up_is_said_in_our_words(
    faults: Faults, kind: str, words: str, behind: Callable[[Faults], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "GIVE_UP_AFTER_S", 3.0)
    monkeypatch.setattr(s3, "READ_TIMEOUT", timedelta(seconds=0.6))
    behind(faults)
    (found,), num_retries = fetch(URIS[:1])
    assert isinstance(found, ItemError)
    assert found.kind == kind
    assert re.fullmatch(words, found.message)
    assert num_retries > 0


def test_writing_and_reading_columns_survive_too(behind: Callable[[Faults], Proxy], store: ObjectStore) -> None:
    behind(Faults(unavailable=0.3, reset=0.3))
    table = pa.table({"id": [1, 2], "uri": ["a", "b"]})
    written = [write_table("s3://scratch/retried", f"part-{index}.parquet", table, table.schema) for index in range(8)]
    assert sum(file.num_retries for file in written) > 0
    for file in written:
        found = bulk.read_columns(f"s3://scratch/retried/{file.name}", ["id"])
        assert found.equals(table.select(["id"]))
        assert len(bulk.read_object(f"s3://scratch/retried/{file.name}")) > 100


def test_requests_get_fewer_when_the_store_asks_for_it_and_slowly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "SLOW_DOWN_EVERY_S", 0.0)
    limit = RequestLimit(32)
    for _ in range(3):
        limit.slow_down()
    assert limit.limit == 4
    for _ in range(4):
        limit.speed_up()
    assert 4.5 < limit.limit <= 5
    for _ in range(9):
        limit.slow_down()
    assert limit.limit == 1
    for _ in range(2000):
        limit.speed_up()
    assert limit.limit == 32


def test_waiting_for_a_slot_is_not_held_against_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "REQUESTS", RequestLimit(1))
    monkeypatch.setattr(retry, "GIVE_UP_AFTER_S", 0.3)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
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


def test_one_wave_of_refusals_halves_once() -> None:
    limit = RequestLimit(32)
    for _ in range(32):
        limit.slow_down()
    assert limit.limit == 16


def test_no_more_requests_than_the_limit_are_in_flight() -> None:
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
            "GenericError: no luck with URL after some time, request id",
        ),
    ],
)
def test_failures_that_differ_in_url_request_id_or_duration_read_alike(first: str, second: str, words: str) -> None:
    assert retry.in_words(GenericError(first)) == retry.in_words(GenericError(second)) == words


def test_errors_of_files_are_told_without_their_names(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.jpg") as error:
        os.open(tmp_path / "folder" / "a.jpg" / ("x" * 300), os.O_RDONLY)
    assert str(tmp_path) not in retry.in_words(error.value)


def test_panic_of_obstore_is_an_error_like_others(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # obstore's builder panics on an endpoint that is no URL, which `s3_store` refuses before.
    def panic(bucket: str, **_: object) -> object:
        S3Store(bucket, endpoint="127.0.0.1:8333").get("x")
        raise AssertionError

    monkeypatch.setattr(bulk, "s3_store", panic)
    (found,) = bulk.fetch_many(["s3://scratch/x"], max_bytes=10)
    assert isinstance(found.content, ItemError)
    assert found.content.kind == "storage_error"
    assert found.content.message.startswith("GenericError: obstore failed")
