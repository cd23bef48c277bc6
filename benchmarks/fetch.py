"""Fetching whole objects from an S3 store: s3fs, Arrow's S3 client, and obstore as used by the tasks of a run.

    python -m benchmarks.fetch [--num-objects 1000] [--rounds 3]

The clients take turns. First they fetch from SeaweedFS on the same machine, which uses part of its cores. The benchmark
prints objects and MB per second of wall time of the best round, and the client's CPU milliseconds per object. Then they
fetch through a proxy that delays each response by 100 ms, as remote stores do. It prints the rates of one round, and
the number of requests per object.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow.fs
import s3fs

from cluster.local.faulty_proxy import Faults, faulty_proxy
from cluster.local.object_store import object_store
from cluster.local.photographs import write_crops
from pipelines.errors import ItemError
from pipelines.inputs.listing import list_objects
from pipelines.storage.bulk import fetch_many, s3_store
from pipelines.storage.retry import MAX_IN_FLIGHT

BUCKET_URI = "s3://images"
BATCH_SIZE = 128  # as in a task of a run
JPEG_QUALITY = 98  # about 100 KB
LATENCY, NUM_DELAYED_OBJECTS = Faults(stalled=1.0, stall_s=0.1), 256


class Rate(NamedTuple):
    """Rate of one client.

    Attributes:
        objects_per_s: Objects per second of wall time.
        mb_per_s: Megabytes per second of wall time.
        cpu_ms: CPU time of this process per object in milliseconds.
    """

    objects_per_s: float
    mb_per_s: float
    cpu_ms: float


def main() -> None:
    """Fetch the same objects with each client in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-objects", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with object_store(buckets=("images",)) as store:
        os.environ.update(store.environment())
        num_bytes = write_crops(BUCKET_URI, args.num_objects, quality=JPEG_QUALITY)
        uris = list_objects(BUCKET_URI, []).table["uri"].to_pylist()
        print(f"{args.num_objects} objects of {num_bytes / args.num_objects / 1000:.0f} KB")
        for name, rate in _compare(uris, args.rounds).items():
            print(f"{name:8}{_format(rate)}{rate.cpu_ms:8.2f} CPU ms/object", flush=True)
        with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], LATENCY) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            s3_store.cache_clear()
            few = uris[:NUM_DELAYED_OBJECTS]
            print(f"{len(few)} of them, with a latency of 100 ms")
            for name, fetch in _clients().items():
                proxy.counts.clear()
                rate = _measure(fetch, few)
                print(f"{name:8}{_format(rate)}{proxy.counts.total() / len(few):8.2f} requests/object")


def _format(rate: Rate) -> str:
    return f"{rate.objects_per_s:8.0f} objects/s{rate.mb_per_s:8.1f} MB/s"


def _clients() -> dict[str, Callable[[list[str]], int]]:
    return {"s3fs": _s3fs_client(), "Arrow": _arrow_client(), "ecaray": _ecaray_client}


def _compare(uris: list[str], num_rounds: int) -> dict[str, Rate]:
    clients = _clients()
    rounds = [{name: _measure(fetch, uris) for name, fetch in clients.items()} for _ in range(num_rounds)]
    return {name: max(rates[name] for rates in rounds) for name in clients}


def _measure(fetch: Callable[[list[str]], int], uris: list[str]) -> Rate:
    cpu_before, before = time.process_time(), time.monotonic()
    num_bytes = sum(fetch(uris[start : start + BATCH_SIZE]) for start in range(0, len(uris), BATCH_SIZE))
    elapsed, cpu = time.monotonic() - before, time.process_time() - cpu_before
    return Rate(len(uris) / elapsed, num_bytes / elapsed / 1e6, 1000 * cpu / len(uris))


def _s3fs_client() -> Callable[[list[str]], int]:
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    return lambda uris: sum(map(len, filesystem.cat(uris).values()))


def _arrow_client() -> Callable[[list[str]], int]:
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    threads = ThreadPoolExecutor(MAX_IN_FLIGHT)

    def read(uri: str) -> int:
        with filesystem.open_input_file(uri.removeprefix("s3://")) as file:
            return len(file.read())

    return lambda uris: sum(threads.map(read, uris))


def _ecaray_client(uris: list[str]) -> int:
    num_bytes = 0
    for fetched in fetch_many(uris, 10**9):
        if isinstance(fetched.content, ItemError):
            raise fetched.content
        num_bytes += len(fetched.content)
    return num_bytes


if __name__ == "__main__":
    main()
