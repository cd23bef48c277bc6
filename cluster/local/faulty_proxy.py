"""HTTP proxy that injects faults into the requests to an object store. It serves one request for each connection.

with faulty_proxy("http://127.0.0.1:8333", Faults(unavailable=0.05)) as proxy:
    ...  # use proxy.endpoint instead of the store's; proxy.counts holds the number of injected faults
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

UNAVAILABLE_BODY = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
)
UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Faults:
    """Probability of each fault for a request, from 0 to 1.

    Attributes:
        unavailable: Probability of the response 503 SlowDown.
        reset: Probability of a connection reset. Half of the resets happen in the middle of the response.
        stalled: Probability of a response that is delayed by `stall_s`.
        stall_s: Delay of stalled responses in seconds.
    """

    unavailable: float = 0.0
    reset: float = 0.0
    stalled: float = 0.0
    stall_s: float = 20.0


@dataclass
class Proxy:
    """Running proxy.

    Attributes:
        endpoint: Endpoint for S3 clients.
        upstream: Endpoint of the store.
        faults: Probabilities of faults.
        counts: Number of requests by fault, where "none" stands for the requests that were forwarded unchanged.
        fetched: Number of GET requests forwarded unchanged, by path.
        is_gone: While true, every connection is reset, as if the store were down.
        rng: Random number generator that selects the faults.
    """

    endpoint: str
    upstream: str
    faults: Faults
    counts: "Counter[str]" = field(default_factory=Counter)
    fetched: "Counter[str]" = field(default_factory=Counter)
    is_gone: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await _read_message(reader, writer)
            fault = self._choose()
            self.counts[fault] += 1
            method, target = request.split(b" ", 2)[:2]
            if method == b"GET" and fault == "none":
                self.fetched[target.decode()] += 1
            await self._respond(request, fault, writer)
            await writer.drain()
        writer.close()

    async def _respond(self, request: bytes, fault: str, writer: asyncio.StreamWriter) -> None:
        if fault == "unavailable":
            writer.write(UNAVAILABLE % len(UNAVAILABLE_BODY) + UNAVAILABLE_BODY)
            return
        if fault == "reset":
            _reset(writer)
            return
        if fault == "stalled":
            await asyncio.sleep(self.faults.stall_s)
        response = await self._forward(request)
        if fault == "reset during the response":
            writer.write(response[: len(response) // 2])
            await writer.drain()
            _reset(writer)
            return
        writer.write(response)

    async def _forward(self, request: bytes) -> bytes:
        address = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))]
        writer.write(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
        response = await reader.read(-1)
        writer.close()
        head, _, body = response.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body

    def _choose(self) -> str:
        if self.is_gone:
            return "reset"
        draw = self.rng.random()
        for name, probability in (("unavailable", self.faults.unavailable), ("stalled", self.faults.stalled)):
            if draw < probability:
                return name
            draw -= probability
        if draw < self.faults.reset:
            return self.rng.choice(["reset", "reset during the response"])
        return "none"


@contextlib.contextmanager
def faulty_proxy(upstream: str, faults: Faults, address: str = "127.0.0.1") -> Iterator[Proxy]:
    """Run a proxy on a free port, in a thread.

    Args:
        upstream: Endpoint of the store.
        faults: Probabilities of faults.
        address: IP address on which the proxy listens.
    """
    with socket.socket() as listening:
        listening.bind((address, 0))
        proxy = Proxy(f"http://{address}:{listening.getsockname()[1]}", upstream, faults)
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(proxy.serve, sock=listening, limit=1 << 26))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield proxy
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.set_exception_handler(lambda loop, context: None)  # ignore errors of cancelled tasks
            if waiting := asyncio.all_tasks(loop):
                for task in waiting:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(waiting))
            loop.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


async def _read_message(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Return the head and body of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:-2])
    if b"100-continue" in fields.get(b"expect", b""):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = b""
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        while not body.endswith(b"0\r\n\r\n"):
            body += await reader.readuntil(b"\r\n")
    elif length := int(fields.get(b"content-length", b"0")):
        body = await reader.readexactly(length)
    return head + body
