"""S3 clients of this process. botocore resolves the settings once; obstore and s3fs get the same ones.

botocore knows environment variables, profiles, containers and instance roles, and the endpoints of each partition
(China, FIPS, dual-stack). Each process resolves its own settings. They are never pickled, so no credential leaves a
process.

Two variables cover what botocore has no setting for. obstore reads both under the same names:

    AWS_SKIP_SIGNATURE=true         read public buckets with unsigned requests
    AWS_REQUEST_PAYER=requester     agree to pay for requests to requester-pays buckets
"""

import functools
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import GenericError

from pipelines.errors import RequestError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from obstore.store import S3Config, S3Credential, S3Store

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DEFAULT_REGION = "us-east-1"
# Timeouts of a whole request and of the next bytes. Stores respond within a second, or stall.
REQUEST_TIMEOUT, READ_TIMEOUT = timedelta(seconds=120), timedelta(seconds=10)
CONNECT_TIMEOUT = timedelta(seconds=5)
# At job start, an endpoint counts as unreachable after this many attempts of this many seconds each.
PROBE_TIMEOUT_S, PROBE_ATTEMPTS = 2, 3
# Timeouts in seconds. botocore's own retries are off because they would multiply with those of s3fs. With the backoff
# of s3fs, this number of attempts bridges an outage of 45 s.
S3FS_CONFIG = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 0}}
S3FS_ATTEMPTS = 11
# obstore asks for credentials again after this time, because botocore's frozen credentials do not say when they expire.
CREDENTIALS_LIFETIME = timedelta(minutes=10)
# The credentials of an instance role may not be available at once. Until they are, requests are unsigned.
CREDENTIALS_RETRY_S = 60.0
# Environment variables that affect the settings, besides those that begin with AWS_.
OTHER_VARIABLES = ("HOME", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
TRUE = ("1", "true", "yes", "on")
ENDPOINT_VARIABLES = "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or endpoint_url of the profile"
# Responses to a request signed for a region other than the bucket's. The response to HEAD is a 400 without a body.
WRONG_REGION = re.compile(
    r"Received redirect|following redirect|<Code>(AuthorizationHeaderMalformed|IllegalLocationConstraint)"
    r"|performing HEAD \S+ in \S+ - .*status code: 400"
)
URL_HEADER = "ecaray-url"

_lock = threading.RLock()


@functools.lru_cache(maxsize=256)
def s3_store(bucket: str, is_written: bool = False, num_retries: int = 0) -> "S3Store":
    """Return the obstore client of a bucket.

    Call this inside the callable given to `Retries.send`, because the client is replaced once the bucket turns out to
    be in another region.

    Args:
        bucket: Name of the bucket.
        is_written: True for uploads, which are signed whenever there are credentials and have no read timeout.
        num_retries: Number of retries by obstore itself. Keep 0 for whole objects: `Retries` counts its retries and
            also covers responses that are cut off.

    Raises:
        RequestError: The settings are invalid, such as an endpoint without a scheme.
    """
    with _lock:
        return settings().store(bucket, is_written=is_written, num_retries=num_retries)


def s3_filesystem(bucket: str, is_written: bool = False) -> "AbstractFileSystem":
    """Return the s3fs file system for reading or writing a bucket. Use it for what obstore cannot do."""
    with _lock:
        found = settings()
        return found.filesystem(found.is_signed(bucket, is_written))


def has_any(bucket: str, prefix: str) -> bool:
    """Return whether any key in `bucket` begins with `prefix`. Takes a few seconds at most."""
    with _lock:
        found = settings()
        client = found.client(found.region_of(bucket), found.is_signed(bucket))
    return bool(client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1, **found.payer()).get("KeyCount"))


def has_credentials() -> bool:
    """Return whether this process has S3 credentials."""
    with _lock:
        return settings().credentials() is not None


def in_region_of_bucket(request: Callable[[], Result]) -> Result:
    """Send an obstore request, and send it again if the bucket turns out to be in another region.

    Later requests go to that region at once.

    Args:
        request: Callable that gets its client from `s3_store` on every call.
    """
    sent_at = time.monotonic()
    try:
        return request()
    except GenericError as error:
        if not _follow_redirect(str(error), sent_at):
            raise
    return request()


def _follow_redirect(error: str, sent_at: float) -> bool:
    """Record a bucket's region from a redirect, and return whether to send the request again."""
    reason = error.partition("\n\nDebug source")[0]
    if not WRONG_REGION.search(reason):
        return False
    with _lock:
        is_followed = settings().follow_redirect(reason, sent_at)
        s3_store.cache_clear()
    return is_followed


def settings() -> "S3Settings":
    """Return the settings for the current environment variables, cached per environment."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    others = {name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ}
    return _settings_of(tuple(sorted((variables | others).items())))


@functools.lru_cache(maxsize=8)
def _settings_of(environment: tuple[tuple[str, str], ...]) -> "S3Settings":
    return S3Settings(dict(environment))


def reset() -> None:
    """Drop all cached settings and clients, so that the next request resolves them again."""
    with _lock:
        _settings_of.cache_clear()
        s3_store.cache_clear()


class S3Settings:
    """Region, endpoint, credentials, certificates, signing and payer, and the clients made from them.

    Not thread-safe. Callers hold this module's lock.

    Args:
        environment: Environment variables that determine the settings.

    Raises:
        RequestError: A profile or file that the variables name cannot be read.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session

        self._session = Session()
        try:
            region = self._session.get_config_variable("region")
            ca_bundle = self._session.get_config_variable("ca_bundle")
        except BotoCoreError as error:
            raise RequestError(f"S3 settings: {error}") from None
        # botocore does not read AWS_REGION, which all other AWS SDKs prefer.
        self.region: str = environment.get("AWS_REGION") or region or DEFAULT_REGION
        # obstore reads SSL_CERT_FILE itself; botocore and s3fs do not.
        self.verify: str | bool = ca_bundle or environment.get("SSL_CERT_FILE") or True
        self.skip_signature = environment.get("AWS_SKIP_SIGNATURE", "").lower() in TRUE
        self.request_payer = environment.get("AWS_REQUEST_PAYER", "").lower() in ("requester", *TRUE)
        self._root_certificates = _read_certificates(ca_bundle) if ca_bundle else None
        self._credentials: Any = None
        self._credentials_requested_at: float | None = None
        self._regions: dict[str, str] = {}
        self._region_found_at: dict[str, float] = {}
        self._is_public: dict[str, bool] = {}
        self._clients: dict[tuple[str, bool], Any] = {}
        self._url_clients: dict[str, Any] = {}
        self._filesystems: dict[bool, AbstractFileSystem] = {}
        self._stores: dict[tuple[str, bool, int], S3Store] = {}
        self._buckets: dict[str, str] = {}

    def region_of(self, bucket: str) -> str:
        """Return the region that a bucket was found in, or the configured region."""
        return self._regions.get(bucket, self.region)

    def payer(self) -> dict[str, str]:
        """Return the keyword arguments for botocore methods that say who pays for the request."""
        return {"RequestPayer": "requester"} if self.request_payer else {}

    def credentials(self) -> Any:
        """Return botocore's self-refreshing credentials, or None."""
        now = time.monotonic()
        requested_at = self._credentials_requested_at
        if self._credentials is None and (requested_at is None or now - requested_at > CREDENTIALS_RETRY_S):
            self._credentials = self._session.get_credentials()
            self._credentials_requested_at = now
            if self._credentials is not None:  # the unsigned clients made so far are obsolete
                self._stores.clear()
                s3_store.cache_clear()
        return self._credentials

    def is_signed(self, bucket: str, is_written: bool = False) -> bool:
        """Return whether requests to a bucket are signed.

        With AWS_SKIP_SIGNATURE, only buckets that allow anonymous listing are read unsigned, so that results can go to
        a private bucket while images come from a public one.
        """
        if self.credentials() is None:
            return False
        if is_written or not self.skip_signature:
            return True
        return not self._allows_anonymous_listing(bucket)

    def _allows_anonymous_listing(self, bucket: str) -> bool:
        from botocore.exceptions import ClientError

        if bucket not in self._is_public:
            try:
                self.client(self.region_of(bucket), is_signed=False).list_objects_v2(Bucket=bucket, MaxKeys=1)
                self._is_public[bucket] = True
            except ClientError:
                self._is_public[bucket] = False
        return self._is_public[bucket]

    def client(self, region: str, is_signed: bool) -> Any:
        """Return a botocore client with short timeouts.

        Raises:
            RequestError: The endpoint is not a URL, or another setting is invalid.
        """
        if (region, is_signed) not in self._clients:
            self._clients[region, is_signed] = self._make_client(region, is_signed)
        return self._clients[region, is_signed]

    def _make_client(self, region: str, is_signed: bool) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            connect_timeout=PROBE_TIMEOUT_S,
            read_timeout=PROBE_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": PROBE_ATTEMPTS},
            **({} if is_signed else {"signature_version": UNSIGNED}),
        )
        try:
            client = self._session.create_client("s3", region_name=region, config=config, verify=self.verify)
        except BotoCoreError as error:
            raise RequestError(f"S3 settings: {error}") from None
        except ValueError as error:
            endpoint = str(error).removeprefix("Invalid endpoint: ")
            raise RequestError(_invalid_endpoint_message("" if endpoint == str(error) else endpoint)) from None
        _check_endpoint(client.meta.endpoint_url)
        return client

    def filesystem(self, is_signed: bool) -> "AbstractFileSystem":
        """Return the s3fs file system with these settings."""
        if is_signed not in self._filesystems:
            import s3fs

            self.client(self.region, is_signed)  # raises RequestError if the settings are invalid
            self._filesystems[is_signed] = s3fs.S3FileSystem(
                anon=not is_signed,
                endpoint_url=None,
                client_kwargs={"region_name": self.region, "verify": self.verify},
                config_kwargs=S3FS_CONFIG,
                requester_pays=self.request_payer,
                use_listings_cache=False,
                skip_instance_cache=True,
            )
        return self._filesystems[is_signed]

    def store(self, bucket: str, is_written: bool, num_retries: int) -> "S3Store":
        """Return the obstore client of a bucket."""
        if (bucket, is_written, num_retries) not in self._stores:
            self._stores[bucket, is_written, num_retries] = self._make_store(bucket, is_written, num_retries)
        return self._stores[bucket, is_written, num_retries]

    def _make_store(self, bucket: str, is_written: bool, num_retries: int) -> "S3Store":
        from obstore.store import S3Store

        endpoint, is_virtual_hosted = self._endpoint_of(bucket)
        is_signed = self.is_signed(bucket, is_written)
        config: S3Config = {
            "region": self.region_of(bucket),
            "endpoint": endpoint,
            # obstore would read this key from the environment and prefer it over "endpoint".
            "aws_endpoint_url_s3": endpoint,
            "virtual_hosted_style_request": is_virtual_hosted,
            "skip_signature": not is_signed,
            "request_payer": self.request_payer,
        }
        is_tls = endpoint.startswith("https://")
        return S3Store(
            bucket,
            config=config,
            credential_provider=self._obstore_credentials if is_signed else None,
            retry_config={"max_retries": num_retries},
            client_options={
                "allow_http": not is_tls,
                "timeout": REQUEST_TIMEOUT,
                "connect_timeout": CONNECT_TIMEOUT,
                # The read timeout would expire during a long upload, because no response bytes arrive meanwhile.
                **({} if is_written else {"read_timeout": READ_TIMEOUT}),
                **({"root_certificate": self._root_certificates} if is_tls and self._root_certificates else {}),
            },
        )

    def _obstore_credentials(self) -> "S3Credential":
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_LIFETIME,
        }

    def _endpoint_of(self, bucket: str) -> tuple[str, bool]:
        """Return the endpoint of a bucket, and True if its host name begins with the bucket (virtual-hosted style).

        Both follow from the URL that botocore makes for a request, which is intercepted before it is sent.
        """
        from botocore.exceptions import BotoCoreError

        region = self.region_of(bucket)
        if region not in self._url_clients:
            self._url_clients[region] = self._make_client(region, is_signed=False)
            self._url_clients[region].meta.events.register("before-send.s3", _respond_with_url)
        try:
            response = self._url_clients[region].head_bucket(Bucket=bucket)
        except BotoCoreError as error:
            raise RequestError(f"s3://{bucket}: {error}") from None
        url = response["ResponseMetadata"]["HTTPHeaders"][URL_HEADER].rstrip("/")
        self._buckets[url] = bucket
        endpoint = url.removesuffix(f"/{bucket}")
        return endpoint, endpoint == url

    def follow_redirect(self, reason: str, sent_at: float) -> bool:
        """Record the region of the bucket that a failed request went to, and return whether to send it again.

        Args:
            reason: Error message of obstore.
            sent_at: Time at which the request was sent, by `time.monotonic`.
        """
        bucket = self._bucket_in(reason)
        if bucket is None:
            return False
        if self._region_found_at.get(bucket, 0.0) > sent_at:
            return True
        region = self._find_region(bucket, reason)
        if region is None or region == self.region_of(bucket):
            return False
        log.info(
            "bucket %s is in region %s, not %s: sending its requests there from now on",
            bucket,
            region,
            self.region_of(bucket),
        )
        self._regions[bucket], self._region_found_at[bucket] = region, time.monotonic()
        self._stores = {key: store for key, store in self._stores.items() if key[0] != bucket}
        return True

    def _bucket_in(self, reason: str) -> str | None:
        """Return the bucket of the URL in an obstore error message."""
        found = re.search(r"https?://[^\s?]+", reason)
        url = found.group().rstrip("/") if found else ""
        return next((bucket for base, bucket in self._buckets.items() if f"{url}/".startswith(f"{base}/")), None)

    def _find_region(self, bucket: str, reason: str) -> str | None:
        """Return the region that the store reports for a bucket, which S3 does even when it denies the request."""
        from botocore.exceptions import ClientError

        if reported := re.search(r"<Region>([^<]+)</Region>", reason):
            return reported.group(1)
        regions: list[str] = []

        def record_region(response_dict: Any, **_: Any) -> None:
            regions.append((response_dict or {}).get("headers", {}).get("x-amz-bucket-region", ""))

        # Use a new client. One that has followed a redirect would go straight to the bucket's region, and only the
        # response of another region is sure to name it.
        client = self._make_client(self.region_of(bucket), is_signed=self.credentials() is not None)
        client.meta.events.register("response-received.s3.HeadBucket", record_region)
        try:
            client.head_bucket(Bucket=bucket)
        except ClientError as error:
            log.debug("HEAD of bucket %s: %s", bucket, error)
        return next(filter(None, regions), None)


def _respond_with_url(request: Any, **_: Any) -> Any:
    """Return a fake response to a botocore request, with the request's URL in a header."""
    import urllib3
    from botocore.awsrequest import AWSResponse

    empty = urllib3.HTTPResponse(body=io.BytesIO(), preload_content=False)
    return AWSResponse(request.url, 200, {URL_HEADER: request.url}, empty)


def _check_endpoint(endpoint: str) -> None:
    """Raise RequestError if an endpoint is not a valid URL. obstore would panic on it."""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:
        is_url = False
    if "@" in endpoint:
        raise RequestError(
            f"the S3 endpoint contains a user or password ({ENDPOINT_VARIABLES}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile or a role instead"
        )
    if not is_url:
        raise RequestError(_invalid_endpoint_message(endpoint))


def _invalid_endpoint_message(endpoint: str) -> str:
    shown = "" if "@" in endpoint else f" {endpoint!r}" if endpoint else ""
    return f"the S3 endpoint{shown} is not a URL such as https://host:port ({ENDPOINT_VARIABLES})"


def _read_certificates(path: str) -> bytes:
    """Return the PEM certificates in a file, or in all files of a folder.

    Raises:
        RequestError: A file cannot be read.
    """
    bundle = Path(path)
    try:
        files = sorted(file for file in bundle.iterdir() if file.is_file()) if bundle.is_dir() else [bundle]
        return b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise RequestError(f"cannot read the CA bundle {path} (AWS_CA_BUNDLE or ca_bundle): {error.strerror}") from None
