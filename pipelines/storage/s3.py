"""S3 clients of this process, which all get the same answers: botocore is asked once, obstore and s3fs are told.

botocore knows variables, profiles, containers and instance roles, and the endpoints of each partition (China, FIPS,
dual-stack). Each process asks for itself: nothing of it is pickled, so no credential leaves a process.

Two variables add what botocore has no setting for. obstore reads both under the same names:

    AWS_SKIP_SIGNATURE=true         read without a signature what can be read so, as public buckets can
    AWS_REQUEST_PAYER=requester     agree to pay for requests to buckets whose requester pays
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
# Timeouts of a whole request and of the next bytes. Stores answer within a second, or stall.
REQUEST_TIMEOUT, READ_TIMEOUT = timedelta(seconds=120), timedelta(seconds=10)
CONNECT_TIMEOUT = timedelta(seconds=5)
# When a job starts, an endpoint that takes longer than this, so many times, counts as unreachable.
PROBE_TIMEOUT_S, PROBE_ATTEMPTS = 2, 3
# s3fs: seconds. Retries of botocore would multiply with those of s3fs; with its waits between the attempts, an endpoint
# may be gone for 45 s.
S3FS_CONFIG = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 0}}
S3FS_ATTEMPTS = 11
# Temporary credentials whose source does not say when they expire are asked for again after this.
CREDENTIALS_LIFETIME = timedelta(minutes=10)
# An instance's role may not answer at once; until there are credentials, requests are unsigned.
ASK_FOR_CREDENTIALS_EVERY_S = 60.0
# Variables that change an answer, beside those that begin with AWS_.
OTHER_VARIABLES = ("HOME", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
TRUE = ("1", "true", "yes", "on")
ENDPOINT_VARIABLES = "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or endpoint_url of the profile"
# Answers to a request that was signed for another region than the bucket's. A HEAD request gets no body, only a 400.
WRONG_REGION = re.compile(
    r"Received redirect|following redirect|<Code>(AuthorizationHeaderMalformed|IllegalLocationConstraint)"
    r"|performing HEAD \S+ in \S+ - .*status code: 400"
)
URL_HEADER = "ecaray-url"

_lock = threading.RLock()


@functools.lru_cache(maxsize=256)
def s3_store(bucket: str, is_written: bool = False, num_retries: int = 0) -> "S3Store":
    """Return obstore's client of a bucket.

    Call it within the request that `Retries.send` gets: the client of a bucket is another one once the bucket's region
    is known.

    Args:
        bucket: name of the bucket.
        is_written: for uploads: signed whenever there are credentials, and without a read timeout.
        num_retries: retries by obstore itself. None for whole objects: `Retries` counts them, and also retries when
            an answer breaks off.

    Raises:
        RequestError: the settings cannot be right, such as an endpoint without a scheme.
    """
    with _lock:
        return settings().store(bucket, is_written=is_written, num_retries=num_retries)


def s3_filesystem(bucket: str, is_written: bool = False) -> "AbstractFileSystem":
    """Return the s3fs file system that reads, or writes, a bucket: for what obstore cannot do."""
    with _lock:
        found = settings()
        return found.filesystem(found.is_signed(bucket, is_written))


def has_any(bucket: str, prefix: str) -> bool:
    """Return whether any key of `bucket` begins with `prefix`; takes a few seconds at most."""
    with _lock:
        found = settings()
        client = found.client(found.region_of(bucket), found.is_signed(bucket))
    return bool(client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1, **found.payer()).get("KeyCount"))


def has_credentials() -> bool:
    """Return whether this process has found credentials for S3."""
    with _lock:
        return settings().credentials() is not None


def in_region_of_bucket(request: Callable[[], Result]) -> Result:
    """Send a request of obstore's; if the bucket is in another region, send it there, as all later ones.

    Args:
        request: gets its client from `s3_store` each time it is called.
    """
    sent_at = time.monotonic()
    try:
        return request()
    except GenericError as error:
        if not _follow_redirect(str(error), sent_at):
            raise
    return request()


def _follow_redirect(error: str, sent_at: float) -> bool:
    """Note the region that a bucket is in; return False if `error` has nothing to do with regions."""
    reason = error.partition("\n\nDebug source")[0]
    if not WRONG_REGION.search(reason):
        return False
    with _lock:
        is_followed = settings().follow_redirect(reason, sent_at)
        s3_store.cache_clear()
    return is_followed


def settings() -> "S3Settings":
    """Return the settings that this process's environment gives."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    others = {name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ}
    return _settings_of(tuple(sorted((variables | others).items())))


@functools.lru_cache(maxsize=8)
def _settings_of(environment: tuple[tuple[str, str], ...]) -> "S3Settings":
    return S3Settings(dict(environment))


def forget() -> None:
    """Forget all settings and clients, so that the next request asks anew."""
    with _lock:
        _settings_of.cache_clear()
        s3_store.cache_clear()


class S3Settings:
    """Region, endpoint, credentials, certificates, signing and payer, and the clients made of them.

    Not thread-safe: used under this module's lock.

    Args:
        environment: the variables that give the answers.

    Raises:
        RequestError: a profile or a file that the variables name cannot be read.
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
        # botocore does not read AWS_REGION, which all other SDKs of AWS prefer.
        self.region: str = environment.get("AWS_REGION") or region or DEFAULT_REGION
        # obstore trusts what SSL_CERT_FILE names by itself.
        self.verify: str | bool = ca_bundle or environment.get("SSL_CERT_FILE") or True
        self.skip_signature = environment.get("AWS_SKIP_SIGNATURE", "").lower() in TRUE
        self.request_payer = environment.get("AWS_REQUEST_PAYER", "").lower() in ("requester", *TRUE)
        self._root_certificates = _read_certificates(ca_bundle) if ca_bundle else None
        self._credentials: Any = None
        self._asked_for_credentials_at: float | None = None
        self._regions: dict[str, str] = {}
        self._learned_at: dict[str, float] = {}
        self._is_public: dict[str, bool] = {}
        self._clients: dict[tuple[str, bool], Any] = {}
        self._url_clients: dict[str, Any] = {}
        self._filesystems: dict[bool, AbstractFileSystem] = {}
        self._stores: dict[tuple[str, bool, int], S3Store] = {}
        self._buckets: dict[str, str] = {}

    def region_of(self, bucket: str) -> str:
        """Return the region that a bucket turned out to be in, else the configured one."""
        return self._regions.get(bucket, self.region)

    def payer(self) -> dict[str, str]:
        """Return the argument of botocore's methods that says who pays."""
        return {"RequestPayer": "requester"} if self.request_payer else {}

    def credentials(self) -> Any:
        """Return botocore's credentials, which refresh themselves, or None."""
        now = time.monotonic()
        asked_at = self._asked_for_credentials_at
        if self._credentials is None and (asked_at is None or now - asked_at > ASK_FOR_CREDENTIALS_EVERY_S):
            self._credentials = self._session.get_credentials()
            self._asked_for_credentials_at = now
            if self._credentials is not None:  # the unsigned clients made so far are obsolete
                self._stores.clear()
                s3_store.cache_clear()
        return self._credentials

    def is_signed(self, bucket: str, is_written: bool = False) -> bool:
        """Return whether requests to a bucket are signed.

        With AWS_SKIP_SIGNATURE, a bucket that does not list its objects to everybody is read with credentials, where
        there are any: results can go to a private bucket while images come from a public one.
        """
        if self.credentials() is None:
            return False
        if is_written or not self.skip_signature:
            return True
        return not self._lists_to_everybody(bucket)

    def _lists_to_everybody(self, bucket: str) -> bool:
        from botocore.exceptions import ClientError

        if bucket not in self._is_public:
            try:
                self.client(self.region_of(bucket), is_signed=False).list_objects_v2(Bucket=bucket, MaxKeys=1)
                self._is_public[bucket] = True
            except ClientError:
                self._is_public[bucket] = False
        return self._is_public[bucket]

    def client(self, region: str, is_signed: bool) -> Any:
        """Return a client of botocore's with short timeouts.

        Raises:
            RequestError: the endpoint is not a URL, or another setting cannot be right.
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
            raise RequestError(_wrong_endpoint("" if endpoint == str(error) else endpoint)) from None
        _check_endpoint(client.meta.endpoint_url)
        return client

    def filesystem(self, is_signed: bool) -> "AbstractFileSystem":
        """Return s3fs's file system with these settings."""
        if is_signed not in self._filesystems:
            import s3fs

            self.client(self.region, is_signed)  # refuses wrong settings
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
        """Return obstore's client of a bucket."""
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
            # obstore prefers this one, which it would read from the environment.
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
                # While a request is being sent, no bytes of an answer come.
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
        """Return the endpoint of a bucket, and whether its host name begins with the bucket's (virtual-hosted style).

        botocore says by the URL of a request, which is not sent.
        """
        from botocore.exceptions import BotoCoreError

        region = self.region_of(bucket)
        if region not in self._url_clients:
            self._url_clients[region] = self._make_client(region, is_signed=False)
            self._url_clients[region].meta.events.register("before-send.s3", _answer_with_url)
        try:
            answer = self._url_clients[region].head_bucket(Bucket=bucket)
        except BotoCoreError as error:
            raise RequestError(f"s3://{bucket}: {error}") from None
        url = answer["ResponseMetadata"]["HTTPHeaders"][URL_HEADER].rstrip("/")
        self._buckets[url] = bucket
        endpoint = url.removesuffix(f"/{bucket}")
        return endpoint, endpoint == url

    def follow_redirect(self, reason: str, sent_at: float) -> bool:
        """Note the region of the bucket that a failed request went to; return whether to send the request again.

        Args:
            reason: obstore's words.
            sent_at: of the request, by `time.monotonic`.
        """
        bucket = self._bucket_in(reason)
        if bucket is None:
            return False
        if self._learned_at.get(bucket, 0.0) > sent_at:
            return True
        region = self._find_region(bucket, reason)
        if region is None or region == self.region_of(bucket):
            return False
        log.info(
            "bucket %s is in region %s, not %s: its requests go there from now on",
            bucket,
            region,
            self.region_of(bucket),
        )
        self._regions[bucket], self._learned_at[bucket] = region, time.monotonic()
        self._stores = {key: store for key, store in self._stores.items() if key[0] != bucket}
        return True

    def _bucket_in(self, reason: str) -> str | None:
        """Return the bucket of the URL in an error of obstore's."""
        found = re.search(r"https?://[^\s?]+", reason)
        url = found.group().rstrip("/") if found else ""
        return next((bucket for base, bucket in self._buckets.items() if f"{url}/".startswith(f"{base}/")), None)

    def _find_region(self, bucket: str, reason: str) -> str | None:
        """Return the region that the store says a bucket is in, as S3 does even where it refuses."""
        from botocore.exceptions import ClientError

        if said := re.search(r"<Region>([^<]+)</Region>", reason):
            return said.group(1)
        said_regions: list[str] = []

        def note(response_dict: Any, **_: Any) -> None:
            said_regions.append((response_dict or {}).get("headers", {}).get("x-amz-bucket-region", ""))

        # A client of its own: one that followed a redirect before would go on to the bucket's region, and only the
        # answer of another region is sure to name it.
        client = self._make_client(self.region_of(bucket), is_signed=self.credentials() is not None)
        client.meta.events.register("response-received.s3.HeadBucket", note)
        try:
            client.head_bucket(Bucket=bucket)
        except ClientError as error:
            log.debug("HEAD of bucket %s: %s", bucket, error)
        return next((region for region in said_regions if region), None)


def _answer_with_url(request: Any, **_: Any) -> Any:
    """Answer a request of botocore's, in place of the store, with its URL in a header."""
    import urllib3
    from botocore.awsrequest import AWSResponse

    nothing = urllib3.HTTPResponse(body=io.BytesIO(), preload_content=False)
    return AWSResponse(request.url, 200, {URL_HEADER: request.url}, nothing)


def _check_endpoint(endpoint: str) -> None:
    """Raise RequestError unless clients take an endpoint: obstore panics where it cannot parse one."""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:
        is_url = False
    if "@" in endpoint:
        raise RequestError(
            f"the S3 endpoint holds a user or password ({ENDPOINT_VARIABLES}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile or a role"
        )
    if not is_url:
        raise RequestError(_wrong_endpoint(endpoint))


def _wrong_endpoint(endpoint: str) -> str:
    shown = "" if "@" in endpoint else f" {endpoint!r}" if endpoint else ""
    return f"the S3 endpoint{shown} is not a URL such as https://host:port ({ENDPOINT_VARIABLES})"


def _read_certificates(path: str) -> bytes:
    """Return the certificates of a file, or of all files of a folder, as PEM.

    Raises:
        RequestError: there is no such file.
    """
    bundle = Path(path)
    try:
        files = sorted(file for file in bundle.iterdir() if file.is_file()) if bundle.is_dir() else [bundle]
        return b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise RequestError(f"cannot read the CA bundle {path} (AWS_CA_BUNDLE or ca_bundle): {error.strerror}") from None
