"""URIs in configs: secrets, chained file systems and home directories."""

import pytest

from pipelines.config.export import ExportConfig
from pipelines.config.infer import InferConfig
from pipelines.config.parse import parse_config
from pipelines.config.train import TrainConfig
from pipelines.config.uri import check_uri, mask
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError

SECRETS = [
    "https://user:S3CRET@h/x",
    "s3://AKIA:S3CRET@b/x",
    "https://S3CRET@h/x",
    "s3://S3CRET@bucket/x",
    "http://user:S3C%2FRE/S3CRET@h/x",
    "s3://AKIA:S3C/RET/S3CRET@bucket/x",
    "abfs://user:S3CRET@account.dfs.core.windows.net/x",
    "https://user:p'S3CRET w@h/x",
    "https://h/x?X-Amz-Signature=S3CRET",
    "https://h/x?X-Amz-Credential=a&X-Amz-Security-Token=S3CRET",
    "https://h/x?sv=1&sig=S3CRET",
    "HTTPS://h/x?sig=S3CRET",
    "https://h/x?AWSAccessKeyId=A&Signature=S3CRET",
    "https://h/x?X-Goog-Signature=S3CRET",
    "https://h/x?Policy=a&Signature=S3CRET&Key-Pair-Id=b",
    "https://h/x?access_token=S3CRET",
    "https://h/x?accessToken=S3CRET",
    "https://h/x?token=S3CRET",
    "https://h/x?auth=S3CRET",
    "https://h/x?api_key=S3CRET",
    "https://h/x?key=S3CRET",
    "https://h/x?password=S3CRET",
    "https://h/x?%73ig=S3CRET",
    "https://h/x;sig=S3CRET",
    "https://h/x#access_token=S3CRET",
    "abfs://c@acc.dfs.core.windows.net/x?sig=S3CRET",
    "s3://b/x?X-Amz-Signature=S3CRET",
    "simplecache::https://user:S3CRET@h/x",
    "file://user:S3CRET@nas/share",
]
HARMLESS = [
    "s3://bucket/a@b.jpg",
    "s3://bucket/key=5/author=me/x.jpg",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/a@b.jpg",
    "http://host:8080/img@2x.png",
    "http://[::1]:8080/img@2x.png",
    "https://h/x?width=200&author=me&country=DE",
    "abfs://container@account.dfs.core.windows.net/x",
    "/data/user:pass@host/x",
    "file:///data/user:pass@host/x",
    "/data/x?token=1",
    "gs://bucket/x",
    "pretrained",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_secret_in_a_uri_is_refused_without_being_printed(uri: str) -> None:
    for schema, key in (
        (InferConfig, "input.uri"),
        (InferConfig, "output.uri"),
        (InferConfig, "model.weights"),
        (TrainConfig, "data.train.uri"),
        (TrainConfig, "data.validation.uri"),
        (TrainConfig, "model.weights"),
        (ExportConfig, "checkpoint.uri"),
        (VerifyConfig, "output.uri"),
    ):
        with pytest.raises(RequestError) as caught:
            parse_config(schema, [f"--{key}", uri])
        assert f"{key} = " in str(caught.value)
        assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize("uri", SECRETS)
def test_mask_hides_secrets_in_uris_and_messages(uri: str) -> None:
    assert "S3CRET" not in mask(uri)
    assert "***" in mask(uri)
    if " " not in uri:
        assert "S3CRET" not in mask(f"cannot read '{uri}': it does not exist")


@pytest.mark.parametrize("uri", HARMLESS)
def test_uris_without_secrets_are_unchanged(uri: str) -> None:
    assert check_uri(uri) == uri
    assert mask(uri) == uri
    assert mask(f"cannot read {uri}: no") == f"cannot read {uri}: no"


def test_secret_is_never_printed_for_any_argument() -> None:
    uri = "https://h/x?sig=S3CRET"
    for arguments in (["--preprocess.mode", uri], [uri], ["--config", uri], [f"--compute.num_workers={uri}"]):
        with pytest.raises(RequestError) as caught:
            parse_config(InferConfig, ["--input.uri", "a", "--output.uri", "b", *arguments])
        assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize("uri", ["zip://a.jpg::s3://b/x.zip", "simplecache::s3://b/x", "zip:///data/x.zip", "dir://x"])
def test_chained_file_systems_are_refused(uri: str) -> None:
    with pytest.raises(RequestError, match=r"input\.uri = .*chained file systems"):
        parse_config(InferConfig, ["--input.uri", uri, "--output.uri", "out"])


def test_tilde_is_expanded_in_every_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    infer = parse_config(InferConfig, ["--input.uri=~", "--output.uri=~/out", "--model.weights=~/w.pth"])
    assert (infer.input.uri, infer.output.uri) == ("/home/someone", "/home/someone/out")
    assert infer.model.weights == "/home/someone/w.pth"
    train = parse_config(TrainConfig, ["--data.train.uri=~/a", "--data.validation.uri=~/b", "--output.uri=~/c"])
    assert train.data.validation is not None
    found = (train.data.train.uri, train.data.validation.uri, train.output.uri)
    assert found == ("/home/someone/a", "/home/someone/b", "/home/someone/c")
    export = parse_config(ExportConfig, ["--checkpoint.uri=~/c", "--output.uri=~/d"])
    assert (export.checkpoint.uri, export.output.uri) == ("/home/someone/c", "/home/someone/d")


def test_unknown_home_directory_is_refused() -> None:
    with pytest.raises(RequestError, match="no home directory is known for ~nobody-of-that-name"):
        parse_config(InferConfig, ["--input.uri", "~nobody-of-that-name/x", "--output.uri", "out"])
