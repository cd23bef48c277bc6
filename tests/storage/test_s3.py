"""AWS features of S3 with each client: regions, endpoints, certificates, public and requester-pays buckets."""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from botocore.credentials import RefreshableCredentials
from pyarrow.fs import PyFileSystem

from cluster.local.object_store import ObjectStore
from pipelines.errors import ItemError, RequestError
from pipelines.inputs import listing
from pipelines.inputs.listing import list_objects
from pipelines.outputs.writer import write_table
from pipelines.storage import bulk, conditional, retry, s3, uris
from pipelines.storage.filesystem import (
    ArrowHandler,
    download,
    exists,
    list_with_sizes,
    open_filesystem,
    read_bytes,
    remove,
    write_bytes,
)
from pipelines.storage.uploads import abort_unfinished_uploads
from tests.support.certificates import write_certificates
from tests.support.infer import read_kind, run_command, summary_of
from tests.support.regional_s3 import RegionalS3

CONFIGURED_REGION = "us-west-2"
# obstore paths can represent the first key, but not the second.
KEYS = ("in/plain.jpg", "in/100%.jpg")


@pytest.fixture
def setenv(images: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that sets AWS variables and resets the cached settings. At first, none are set."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(retry, "GIVE_UP_AFTER_S", 1.0)

    def setenv(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        s3.reset()

    setenv(AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE=str(tmp_path / "config"))
    yield setenv
    s3.reset()


@pytest.fixture
def started(store: ObjectStore) -> Iterator[Callable[..., RegionalS3]]:
    """Return a function that starts a stand-in for S3 in front of the store."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(RegionalS3(store, **options).running())


def keys_of(store: ObjectStore) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key}


@pytest.fixture(scope="module")
def images(store: ObjectStore) -> str:
    """Store an object for each of `KEYS` under a prefix of the bucket `images`, and return the prefix."""
    s3.reset()
    root = "s3://images/regions"
    for key in KEYS:
        write_bytes(uris.join(root, key), key.encode())
    return root


def read_with_each_client(root: str, folder: Path) -> None:
    names = [uris.join(root, key) for key in sorted(KEYS)]
    assert exists(root)
    assert not exists(uris.join(root, "absent"))
    assert list_objects(root, []).table["uri"].to_pylist() == names
    assert set(list_with_sizes(uris.join(root, "in"))) == {
        uris.split_bucket(name)[1].rpartition("/")[2] for name in names
    }
    fetched = [one.content for one in sorted(bulk.fetch_many(names, max_bytes=1000))]
    assert fetched == [uris.split_bucket(name)[1].partition("/")[2].encode() for name in names]
    for name, content in zip(names, fetched):
        assert bulk.read_object(name) == read_bytes(name) == content
        assert Path(download(name, str(folder))).read_bytes() == content
    with pytest.raises(FileNotFoundError):
        bulk.read_object(uris.join(root, "absent"))


def write_with_each_client(root: str) -> None:
    table = pa.table({"id": [1, 2], "uri": ["a", "b"]})
    for name in ("part.parquet", "100%.parquet"):
        write_table(root, name, table, table.schema)
        assert bulk.read_columns(uris.join(root, name), ["id"]).equals(table.select(["id"]))
    large = os.urandom(6 << 20)  # in several parts
    bulk.store_object(uris.join(root, "large"), large)
    assert bulk.read_object(uris.join(root, "large")) == large
    assert conditional.create_object(uris.join(root, "lock"), b"x")
    assert not conditional.create_object(uris.join(root, "lock"), b"y")
    assert "lock" in bulk.list_keys(root)
    assert abort_unfinished_uploads(root) == 0
    write_with_arrow(f"{root}/checkpoints")
    write_bytes(uris.join(root, "small"), b"x")
    remove(uris.join(root, "small"))
    assert not exists(uris.join(root, "small"))


def write_with_arrow(root: str) -> None:
    """Write as Ray Train does, through a file system that was unpickled in a worker."""
    content = pickle.dumps(PyFileSystem(ArrowHandler(root)))
    if keys := os.environ.get("AWS_SECRET_ACCESS_KEY"):
        assert keys.encode() not in content
    arrow, folder = pickle.loads(content), root.removeprefix("s3://")
    arrow.create_dir(f"{folder}/step-1")
    with arrow.open_output_stream(f"{folder}/step-1/model") as file:
        file.write(b"weights")
    assert bulk.read_object(f"{root}/step-1/model") == b"weights"
    arrow.delete_dir(f"{folder}/step-1")
    assert not exists(f"{root}/step-1")


def use_all(root: str, folder: Path) -> None:
    read_with_each_client(root, folder)
    write_with_each_client(f"{root}-{folder.name}")


@pytest.mark.parametrize(
    ("region", "is_malformed"), [("us-west-2", False), ("us-east-1", False), ("eu-west-1", True), ("cn-north-1", True)]
)
def test_bucket_in_another_region_can_be_read_and_written(
    region: str,
    is_malformed: bool,
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stand_in = started(regions={"images": region}, is_malformed=is_malformed)
    setenv(**keys_of(store), AWS_REGION=CONFIGURED_REGION, AWS_ENDPOINT_URL=stand_in.endpoint)
    with caplog.at_level(logging.INFO, "pipelines"):
        use_all(images, tmp_path)
    messages = [record.getMessage() for record in caplog.records if "region" in record.getMessage()]
    assert len(messages) == (region != CONFIGURED_REGION)
    assert all(f"bucket images is in region {region}" in message for message in messages)


@pytest.mark.parametrize("first", ["put", "create", "head", "get_many", "list"])
def test_first_request_of_a_process_follows_the_redirect(
    first: str,
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "ENOUGH_PREFIXES", 1)
    stand_in = started(regions={"images": "eu-west-1"}, is_malformed=first == "head")
    setenv(**keys_of(store), AWS_REGION=CONFIGURED_REGION, AWS_ENDPOINT_URL=stand_in.endpoint)
    if first == "put":
        assert bulk.store_object(f"{images}-put/x", b"x") == 0
    elif first == "create":
        assert conditional.create_object(f"{images}-put/lock-{time.time_ns()}", b"x")
    elif first == "head":
        with pytest.raises(Exception, match="Parquet"):
            bulk.read_columns(f"{images}/{KEYS[0]}", ["id"])
    elif first == "get_many":
        fetched = list(bulk.fetch_many([f"{images}/{KEYS[0]}"] * 40, max_bytes=1000))
        assert {(one.content, one.num_retries) for one in fetched} == {(KEYS[0].encode(), 0)}
    else:
        assert list_objects(images, []).table.num_rows == len(KEYS)
    # However many requests are redirected, the region is looked up once, and later requests are not redirected.
    assert sum(method == "HEAD" and path == "/images" for method, path, _, _ in stand_in.requests) <= 2
    before = len(stand_in.requests)
    bulk.read_object(f"{images}/{KEYS[0]}")
    assert [region for _, _, region, _ in stand_in.requests[before:]] == ["eu-west-1"]


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION", "profile"])
def test_every_client_uses_the_configured_region(
    name: str,
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    tmp_path: Path,
) -> None:
    stand_in = started(regions={"images": "eu-west-1"})
    setenv(**keys_of(store), AWS_ENDPOINT_URL=stand_in.endpoint)
    if name == "profile":
        (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n")
    else:
        setenv(**{name: "eu-west-1"})
    use_all(images, tmp_path)
    assert {region for _, _, region, _ in stand_in.requests} == {"eu-west-1"}


PROFILES = {
    "endpoint_url": "[profile minio]\nregion = eu-west-1\nendpoint_url = {endpoint}\n{keys}",
    "services": "[profile minio]\nregion = eu-west-1\n{keys}services = own\n"
    "[services own]\ns3 =\n  endpoint_url = {endpoint}\n",
}


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_provides_endpoint_region_and_credentials(
    profile: str,
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    tmp_path: Path,
) -> None:
    stand_in = started(regions={"images": "eu-west-1"})
    keys = f"aws_access_key_id = {store.access_key}\naws_secret_access_key = {store.secret_key}\n"
    (tmp_path / "config").write_text(PROFILES[profile].format(endpoint=stand_in.endpoint, keys=keys))
    setenv(AWS_PROFILE="minio")
    use_all(images, tmp_path)
    assert {region for _, _, region, _ in stand_in.requests} == {"eu-west-1"}


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE", "profile"])
def test_every_client_trusts_a_private_ca(
    name: str,
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    tmp_path: Path,
) -> None:
    ca_file, server_file = write_certificates(tmp_path)
    stand_in = started(server_file=server_file)
    setenv(**keys_of(store), AWS_ENDPOINT_URL=stand_in.endpoint)
    if name == "profile":
        (tmp_path / "config").write_text(f"[default]\nca_bundle = {ca_file}\n")
    else:
        setenv(**{name: str(ca_file)})
    use_all(images, tmp_path)


def test_untrusted_certificate_fails_without_retries(
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, server_file = write_certificates(tmp_path)
    setenv(**keys_of(store), AWS_ENDPOINT_URL=started(server_file=server_file).endpoint)
    monkeypatch.setattr(retry, "GIVE_UP_AFTER_S", 60.0)
    (fetched,) = bulk.fetch_many([f"{images}/{KEYS[0]}"], max_bytes=1000)
    assert isinstance(fetched.content, ItemError)
    assert "certificate of the store is not trusted (UnknownIssuer)" in fetched.content.message
    assert fetched.num_retries == 0
    with pytest.raises(RequestError, match="certificate"):
        exists(images)
    with pytest.raises(RequestError, match="certificate"):
        list_objects(images, [])


def test_public_bucket_is_readable_without_credentials(
    store: ObjectStore, images: str, setenv: Callable[..., None], started: Callable[..., RegionalS3], tmp_path: Path
) -> None:
    stand_in = started(public=("images",))
    setenv(AWS_ENDPOINT_URL=stand_in.endpoint)
    read_with_each_client(images, tmp_path)
    assert {region for _, _, region, _ in stand_in.requests} == {""}


def test_private_bucket_without_credentials_fails_with_one_line(
    store: ObjectStore, images: str, setenv: Callable[..., None], started: Callable[..., RegionalS3]
) -> None:
    setenv(AWS_ENDPOINT_URL=started().endpoint)
    with pytest.raises(RequestError, match=r"cannot reach s3://images/.*no AWS credentials were found"):
        exists(images)
    (fetched,) = bulk.fetch_many([f"{images}/{KEYS[0]}"], max_bytes=1000)
    assert isinstance(fetched.content, ItemError)
    assert (fetched.content.kind, fetched.content.message) == (
        "access_denied",
        "the store denied access; no AWS credentials were found",
    )


def test_credentials_that_appear_late_are_used(
    store: ObjectStore,
    images: str,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The credentials of an instance role may appear late, because its service does not always respond at once.
    monkeypatch.setattr(s3, "CREDENTIALS_RETRY_S", 0.0)
    keys = tmp_path / "credentials"
    setenv(AWS_SHARED_CREDENTIALS_FILE=str(keys), AWS_ENDPOINT_URL=started().endpoint)
    (fetched,) = bulk.fetch_many([f"{images}/{KEYS[0]}"], max_bytes=1000)
    assert isinstance(fetched.content, ItemError)
    lines = ("[default]", f"aws_access_key_id = {store.access_key}", f"aws_secret_access_key = {store.secret_key}")
    keys.write_text("\n".join(lines))
    assert s3.has_credentials()
    (fetched,) = bulk.fetch_many([f"{images}/{KEYS[0]}"], max_bytes=1000)
    assert fetched.content == KEYS[0].encode()


def test_credentials_of_a_role_are_requested_again_before_they_expire(setenv: Callable[..., None]) -> None:
    setenv(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret")
    assert s3.has_credentials()
    handed_out_at = datetime.now(UTC)
    expires_at = s3.settings()._obstore_credentials()["expires_at"]
    assert expires_at is not None
    # botocore renews credentials that expire within this time. So those that it hands out are valid for as long.
    valid_for_s = RefreshableCredentials._mandatory_refresh_timeout
    assert 60 <= (expires_at - handed_out_at).total_seconds() <= valid_for_s + 5


def test_skip_signature_reads_public_bucket_and_writes_private_one(
    store: ObjectStore, images: str, setenv: Callable[..., None], started: Callable[..., RegionalS3], tmp_path: Path
) -> None:
    stand_in = started(public=("images",))
    setenv(**keys_of(store), AWS_ENDPOINT_URL=stand_in.endpoint, AWS_SKIP_SIGNATURE="true")
    read_with_each_client(images, tmp_path)
    assert {region for _, _, region, _ in stand_in.requests} == {""}
    write_with_each_client(f"s3://results/{tmp_path.name}")
    read_bytes(f"s3://results/{tmp_path.name}/large")


def test_requests_to_public_buckets_are_signed_by_default(
    store: ObjectStore, images: str, setenv: Callable[..., None], started: Callable[..., RegionalS3], tmp_path: Path
) -> None:
    stand_in = started(public=("images",))
    setenv(**keys_of(store), AWS_ENDPOINT_URL=stand_in.endpoint)
    read_with_each_client(images, tmp_path)
    assert {region for _, _, region, _ in stand_in.requests} == {"us-east-1"}


def test_requester_pays_only_when_configured(
    store: ObjectStore, images: str, setenv: Callable[..., None], started: Callable[..., RegionalS3], tmp_path: Path
) -> None:
    setenv(**keys_of(store), AWS_ENDPOINT_URL=started(paid=("images",)).endpoint)
    with pytest.raises(RequestError, match="AccessDenied"):
        exists(images)
    setenv(AWS_REQUEST_PAYER="requester")
    use_all(images, tmp_path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:8333"}, r"'127.0.0.1:8333' is not a URL such as https://host:port"),
        ({"AWS_ENDPOINT_URL_S3": "localhost:8333"}, r"'localhost:8333' is not a URL"),
        ({"AWS_ENDPOINT_URL": "ftp://host"}, r"'ftp://host' is not a URL"),
        ({"AWS_ENDPOINT_URL": "http://host:99999"}, r"'http://host:99999' is not a URL"),
        ({"AWS_ENDPOINT_URL": "http://[::1"}, r"endpoint is not a URL"),
        ({"AWS_ENDPOINT_URL": "http://user:secret@host"}, r"contains a user or password"),
        ({"AWS_PROFILE": "absent"}, r"profile \(absent\) could not be found"),
        ({"AWS_CA_BUNDLE": "/absent/ca.pem"}, r"cannot read the CA bundle /absent/ca.pem"),
        ({"AWS_REGION": "not a region"}, r"'not a region'"),
    ],
)
def test_invalid_settings_are_refused_with_one_line(
    variables: dict[str, str], message: str, setenv: Callable[..., None]
) -> None:
    setenv(**variables)
    uses: list[Callable[[], Any]] = [
        lambda: exists("s3://bucket/x"),
        lambda: bulk.store_object("s3://bucket/x", b""),
        lambda: open_filesystem("s3://bucket/x"),
        lambda: list_objects("s3://bucket/x", []),
    ]
    for use in uses:
        with pytest.raises(RequestError, match=message) as refused:
            use()
        assert "\n" not in str(refused.value)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "bucket", "endpoint"),
    [
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "b-1", "https://b-1.s3.eu-west-1.amazonaws.com"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "x"}, "bu-1", "https://bu-1.s3.eu-west-1.amazonaws.com"),
        ({"AWS_REGION": "cn-north-1"}, "bucket", "https://bucket.s3.cn-north-1.amazonaws.com.cn"),
        (
            {"AWS_REGION": "us-west-2", "AWS_USE_FIPS_ENDPOINT": "true"},
            "bucket",
            "https://bucket.s3-fips.us-west-2.amazonaws.com",
        ),
        (
            {"AWS_REGION": "us-west-2", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "bucket",
            "https://bucket.s3.dualstack.us-west-2.amazonaws.com",
        ),
        ({"AWS_REGION": "us-west-2"}, "with.dots", "https://s3.us-west-2.amazonaws.com"),
        ({"AWS_ENDPOINT_URL": "https://store:9000/prefix/"}, "bucket", "https://store:9000/prefix"),
        ({"AWS_ENDPOINT_URL_S3": "http://a", "AWS_ENDPOINT_URL": "http://b"}, "bucket", "http://a"),
        ({"AWS_ENDPOINT_URL": ""}, "with.dots", "https://s3.amazonaws.com"),
    ],
)
def test_obstore_endpoint_equals_botocore_endpoint(
    variables: dict[str, str], bucket: str, endpoint: str, setenv: Callable[..., None]
) -> None:
    setenv(**variables)
    config: dict[str, Any] = dict(s3.s3_store(bucket).config)
    assert config["endpoint"] == config["endpoint_url_s3"] == endpoint
    assert config["virtual_hosted_style_request"] == str(f"//{bucket}." in endpoint).lower()


def test_profile_selects_virtual_hosted_style(setenv: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    setenv(AWS_ENDPOINT_URL="https://store.example")
    assert s3.s3_store("bucket").config["endpoint"] == "https://bucket.store.example"


@pytest.mark.slow
def test_infer_reads_public_bucket_and_writes_private_bucket_in_another_region(
    store: ObjectStore,
    setenv: Callable[..., None],
    started: Callable[..., RegionalS3],
    photographs: Path,
    tmp_path: Path,
) -> None:
    ca_file, server_file = write_certificates(tmp_path)
    regions = {"images": "eu-west-1", "results": "cn-north-1"}
    stand_in = started(regions=regions, public=("images",), server_file=server_file)
    keys = f"aws_access_key_id = {store.access_key}\naws_secret_access_key = {store.secret_key}\n"
    (tmp_path / "config").write_text(
        f"[profile own]\nendpoint_url = {stand_in.endpoint}\nregion = us-west-2\nca_bundle = {ca_file}\n{keys}"
    )
    setenv(AWS_PROFILE="own")
    names = [path.name for path in sorted(photographs.iterdir())[:8]]
    for name in names:
        bulk.store_object(f"s3://images/{tmp_path.name}/{name}", (photographs / name).read_bytes())
    setenv(AWS_SKIP_SIGNATURE="true")
    stand_in.requests.clear()
    done = run_command(
        "jobs.infer",
        *("--input.uri", f"s3://images/{tmp_path.name}", "--output.uri", f"s3://results/{tmp_path.name}"),
        *("--model.name", "mobilenetv3_small_050", "--model.weights", "random", "--outputs.embedding", "false"),
    )
    assert done.returncode == 0, done.stderr
    assert summary_of(done.stdout)["num_ok"] == len(names)
    assert done.stderr.count("bucket results is in region cn-north-1") == 1
    assert read_kind(f"s3://results/{tmp_path.name}", "part").num_rows == len(names)
    assert {region for _, path, region, _ in stand_in.requests if path.startswith("/images")} == {""}
