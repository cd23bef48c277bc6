"""A proxy in front of an object store, which does what stores do on bad days. One request a connection.

with faulty_proxy("http://127.0.0.1:8333", Faults(unavailable=0.05)) as proxy:
    ...  # proxy.endpoint in place of the store's; proxy.counts: what it did
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
    """The share of requests that each of these happens to.

    Attributes:
        unavailable: answered 503 SlowDown.
        reset: the connection is reset, half of them amid the answer.
        stalled: answered after `stall_s` seconds.
    """

    unavailable: float = 0.0
    reset: float = 0.0
    stalled: float = 0.0
    stall_s: float = 20.0


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        endpoint: what S3 clients are given.
        counts: requests by what was done to them.
        fetched: how often the object at each path was asked for.
        is_gone: while true, every connection is reset.
    """

    endpoint: str
    upstream: str
    faults: Faults
    counts: "Counter[str]" = field(default_factory=Counter)
    fetched: "Counter[str]" = field(default_factory=Counter)
    is_gone: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(5))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await _read_message(reader, writer)
            fault = self._choose()
            self.counts[fault] += 1
            method, target = request.split(b" ", 2)[:2]
            if method == b"GET" and fault == "none":
                self.fetched[target.decode()] += 1
            await self._answer(request, fault, writer)
            await writer.drain()
        writer.close()

    async def _answer(self, request: bytes, fault: str, writer: asyncio.StreamWriter) -> None:
        if fault == "unavailable":
            writer.write(UNAVAILABLE % len(UNAVAILABLE_BODY) + UNAVAILABLE_BODY)
            return
        if fault == "reset":
            _reset(writer)
            return
        if fault == "stalled":
            await asyncio.sleep(self.faults.stall_s)
        answer = await self._ask_upstream(request)
        if fault == "reset amid the answer":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
            _reset(writer)
            return
        writer.write(answer)

    async def _ask_upstream(self, request: bytes) -> bytes:
        address = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))]
        writer.write(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
        answer = await reader.read(-1)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body

    def _choose(self) -> str:
        if self.is_gone:
            return "reset"
        draw = self.chance.random()
        for name, share in (("unavailable", self.faults.unavailable), ("stalled", self.faults.stalled)):
            if draw < share:
                return name
            draw -= share
        if draw < self.faults.reset:
            return self.chance.choice(["reset", "reset amid the answer"])
        return "none"


@contextlib.contextmanager
def faulty_proxy(upstream: str, faults: Faults, address: str = "127.0.0.1") -> Iterator[Proxy]:
    """A proxy on a port of its own, in a thread.

    Args:
        upstream: the store's endpoint.
        faults: what happens to requests.
        address: that it listens at.
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
            loop.set_exception_handler(lambda loop, context: None)  # of those cancelled
            if waiting := asyncio.all_tasks(loop):
                for task in waiting:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(waiting))
            loop.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


async def _read_message(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Head and body of a request."""
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
