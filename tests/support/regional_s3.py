"""Stand-in for AWS in front of a store: buckets in regions, redirects, public buckets and requester-pays buckets.

The responses follow "Making requests" of the Amazon S3 user guide, and botocore's S3RegionRedirectorv2. A request that
is signed for another region gets a 301 PermanentRedirect without Location, or a 400 AuthorizationHeaderMalformed. The
response to a HEAD request consists only of the status and x-amz-bucket-region.
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
    """Stand-in for S3 with regions.

    Attributes:
        store: Store that serves the accepted requests.
        regions: Region by bucket. All other buckets are in us-east-1.
        is_malformed: If true, the response to a wrong region is AuthorizationHeaderMalformed, not PermanentRedirect.
        public: Buckets that anyone may read.
        paid: Buckets whose requester pays.
        server_file: File with the key and certificate for TLS, or None for HTTP.
        endpoint: Endpoint for S3 clients.
        requests: Method, path, signing region (empty if unsigned) and status of each request. The status is 200 if the
            request was forwarded.
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
        """Serve requests in threads within the block."""
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
        """Log nothing."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # the client has disconnected
            super().handle_one_request()

    def respond(self) -> None:
        body = self._read_body()
        bucket = urlsplit(self.path).path.split("/")[1]
        region = self.stand_in.regions.get(bucket, "us-east-1")
        signed = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3", self.headers.get("Authorization") or "")
        signed_region = signed.group(1) if signed else ""
        status, code = self._authorize(bucket, region, signed_region)
        self.stand_in.requests.append((self.command, self.path, signed_region, status))
        if code:
            self._reject(status, code, region)
        else:
            self._forward(body, is_signed=bool(signed))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = respond

    def _authorize(self, bucket: str, region: str, signed_region: str) -> tuple[int, str]:
        if not signed_region:
            is_allowed = bucket in self.stand_in.public and self.command in ("GET", "HEAD")
            return (200, "") if is_allowed else (403, "AccessDenied")
        if signed_region != region:
            return (400, "AuthorizationHeaderMalformed") if self.stand_in.is_malformed else (301, "PermanentRedirect")
        if bucket in self.stand_in.paid and self.headers.get("x-amz-request-payer") != "requester":
            return 403, "AccessDenied"
        return 200, ""

    def _reject(self, status: int, code: str, region: str) -> None:
        detail = f"<Region>{region}</Region>" if code == "AuthorizationHeaderMalformed" else ""
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>No.</Message>{detail}</Error>'
        )
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
        response = connection.getresponse()
        content = response.read()
        connection.close()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header(
            "Content-Length", (response.getheader("Content-Length") or "0") if is_head else str(len(content))
        )
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def _sign(self) -> dict[str, str]:
        """Return signed headers for a public bucket, since SeaweedFS does not support public buckets."""
        request = AWSRequest(self.command, f"{self.stand_in.store.endpoint}{self.path}")
        keys = Credentials(self.stand_in.store.access_key, self.stand_in.store.secret_key)
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        return {**dict(request.headers.items()), "Host": urlsplit(self.stand_in.store.endpoint).netloc}
