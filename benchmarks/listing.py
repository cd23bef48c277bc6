"""Time and memory of the driver to list ten million keys, write the manifest, and plan the tasks.

    python -m benchmarks.listing [--num-keys 10000000] [--keys-per-folder 10000]

A local store cannot hold that many objects. Instead, a server in a separate process implements only S3's
ListObjectsV2, and generates the keys of each page from their numbers. It uses part of the cores.
"""

import argparse
import hashlib
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipelines.engine.source import PendingInputs, plan_tasks
from pipelines.inputs.idset import IdSet
from pipelines.inputs.listing import list_objects
from pipelines.inputs.manifest import Manifest, write_manifest

INPUT_URI = "s3://bucket/images"
KEYS_PER_PAGE = 1000
BATCH_SIZE = 256
NUM_THREADS = 2
ETAG = hashlib.sha256(b"").hexdigest()[:32]


def main() -> None:
    """List the keys, write the manifest and plan the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-keys", type=int, default=10_000_000)
    parser.add_argument("--keys-per-folder", type=int, default=10_000)
    args = parser.parse_args()
    receiver, sender = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(args, sender), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{receiver.recv()}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
    }
    print(f"{args.num_keys:,} keys in folders of {args.keys_per_folder:,}; memory is the peak so far")
    with tempfile.TemporaryDirectory() as output:
        manifest = _list_into_manifest(output, args.num_keys)
        source = _measure("tasks planned", lambda: _plan(manifest))
        rows = _measure("rows of the last task", lambda: source.rows_of(source.num_tasks - 1))
        print(f"{source.num_tasks:,} tasks; the last row: {rows['uri'][-1].as_py()}")
    server.terminate()


def _plan(manifest: Manifest) -> PendingInputs:
    tasks = plan_tasks(manifest.num_inputs, BATCH_SIZE, NUM_THREADS)
    none = IdSet(manifest.num_inputs)
    return PendingInputs(manifest, none, none, tasks.starts)


def _list_into_manifest(folder: str, num_keys: int) -> Manifest:
    listing = _measure("listed", lambda: list_objects(INPUT_URI, []))
    assert listing.table.num_rows == num_keys
    written: Manifest = _measure("manifest written", lambda: write_manifest(folder, INPUT_URI, [], listing))
    return written


def _measure(title: str, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    result = work()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{title:24}{time.monotonic() - started:8.1f} s{peak_gb:8.2f} GB", flush=True)
    return result


def _serve(args: argparse.Namespace, ready: Connection) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
            body = _page(args, query).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def _page(args: argparse.Namespace, query: dict[str, str]) -> str:
    """Return the folders below `images/`, or a page of the keys in one folder."""
    num_folders = -(-args.num_keys // args.keys_per_folder)
    folder = query.get("prefix", "").rstrip("/").rpartition("/")[2]
    if not folder.isdigit():
        prefixes = (f"<CommonPrefixes><Prefix>images/{i:06d}/</Prefix></CommonPrefixes>" for i in range(num_folders))
        return _xml("".join(prefixes), None)
    start = int(query.get("continuation-token", 0))
    stop = min(start + KEYS_PER_PAGE, args.keys_per_folder, args.num_keys - int(folder) * args.keys_per_folder)
    contents = "".join(
        f"<Contents><Key>images/{folder}/photograph-{index:09d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z"
        f"</LastModified><ETag>&quot;{ETAG}&quot;</ETag><Size>100000</Size></Contents>"
        for index in range(start, stop)
    )
    return _xml(contents, stop if stop - start == KEYS_PER_PAGE and stop < args.keys_per_folder else None)


def _xml(content: str, next_start: int | None) -> str:
    more = f"<NextContinuationToken>{next_start}</NextContinuationToken>" if next_start is not None else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{content}</ListBucketResult>"
    )


if __name__ == "__main__":
    main()
