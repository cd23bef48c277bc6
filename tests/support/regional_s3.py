"""A stand-in for AWS in front of a store: buckets in regions, redirects, public buckets, and requesters that pay.

What AWS answers is in "Making requests" of the Amazon S3 user guide, and in botocore's S3RegionRedirectorv2: a request
that is signed for another region gets a 301 PermanentRedirect without Location, or a 400 AuthorizationHeaderMalformed;
of a HEAD request, only the status and x-amz-bucket-region arrive.
"""

import contextlib
import http.client
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from cluster.local.object_store import ObjectStore

HOP_HEADERS = ("connection", "transfer-encoding", "content-length")


@dataclass
class RegionalS3:
    """A running stand-in.

    Attributes:
        store: answers the requests that are let through.
        regions: region by bucket; the others are in us-east-1.
        is_malformed: a wrong region is answered with AuthorizationHeaderMalformed, not with PermanentRedirect.
        public: buckets that everybody may read.
        paid: buckets whose requester pays.
        server_file: key and certificate, for TLS.
        endpoint: what S3 clients are given.
        requests: of each: method, path, region that it was signed for (empty: unsigned), 200 or the refusal.
    """

    store: ObjectStore
    regions: dict[str, str] = field(default_factory=dict)
    is_malformed: bool = False
    public: tuple[str, ...] = ()
    paid: tuple[str, ...] = ()
    server_file: Path | None = None
    endpoint: str = ""
    requests: list[tuple[str, str, str, int]] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator["RegionalS3"]:
        """Answer requests in threads, for the length of a `with` block."""
        handler = type("Handler", (_Handler,), {"stand_in": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if self.server_file:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.server_file)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self.endpoint = f"http{'s' if self.server_file else ''}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: RegionalS3
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # the client is gone
            super().handle_one_request()

    def answer(self) -> None:
        body = self._read_body()
        bucket = urlsplit(self.path).path.split("/")[1]
        region = self.stand_in.regions.get(bucket, "us-east-1")
        signed = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3", self.headers.get("Authorization") or "")
        signed_region = signed.group(1) if signed else ""
        status, code = self._judge(bucket, region, signed_region)
        self.stand_in.requests.append((self.command, self.path, signed_region, status))
        if code:
            self._refuse(status, code, region)
        else:
            self._forward(body, is_signed=bool(signed))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def _judge(self, bucket: str, region: str, signed_region: str) -> tuple[int, str]:
        if not signed_region:
            is_allowed = bucket in self.stand_in.public and self.command in ("GET", "HEAD")
            return (200, "") if is_allowed else (403, "AccessDenied")
        if signed_region != region:
            return (400, "AuthorizationHeaderMalformed") if self.stand_in.is_malformed else (301, "PermanentRedirect")
        if bucket in self.stand_in.paid and self.headers.get("x-amz-request-payer") != "requester":
            return 403, "AccessDenied"
        return 200, ""

    def _refuse(self, status: int, code: str, region: str) -> None:
        said = f"<Region>{region}</Region>" if code == "AuthorizationHeaderMalformed" else ""
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>No.</Message>{said}</Error>'
        self.send_response(status)
        self.send_header("x-amz-bucket-region", region)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, body: bytes, is_signed: bool) -> None:
        upstream = urlsplit(self.stand_in.store.endpoint)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
        if not is_signed:
            headers = self._sign()
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=20)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header(
            "Content-Length", (answer.getheader("Content-Length") or "0") if is_head else str(len(content))
        )
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def _sign(self) -> dict[str, str]:
        """Return headers with which the store reads a public bucket, which SeaweedFS knows nothing of."""
        request = AWSRequest(self.command, f"{self.stand_in.store.endpoint}{self.path}")
        keys = Credentials(self.stand_in.store.access_key, self.stand_in.store.secret_key)
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        return {**dict(request.headers.items()), "Host": urlsplit(self.stand_in.store.endpoint).netloc}
