"""Lists: formats, labels, resolution of entries, and refusal of entries from untrusted lists."""

import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.object_store import ObjectStore
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.parse import parse_config
from pipelines.errors import RequestError
from pipelines.inputs import lists
from pipelines.inputs.hosts import private_hosts
from pipelines.inputs.labelled import read_labelled
from pipelines.storage.filesystem import write_bytes


def rows(location: object, *, trust_list: bool = False) -> list[tuple[str, str]]:
    table = read_labelled(str(location), [], trust_list=trust_list).table
    return list(zip(table["uri"].to_pylist(), table["label"].to_pylist()))


def write_list(path: Path, *uris: str) -> Path:
    path.write_text("".join(f"{uri},cat\n" for uri in ("uri", *uris)).replace("uri,cat", "uri,label"))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "uri,label,n\na.jpg,cat,1\n"),
        ("list.CSV", "uri,label\r\na.jpg,cat\r\n"),
        ("twice.csv", "uri,n,label,n\na.jpg,1,cat,2\n"),
        ("bom.csv", "\ufeffuri,label\na.jpg,cat\n"),
        ("list.tsv", "uri\tlabel\na.jpg\tcat\n"),
        ("list.Tsv", "label\turi\ncat\ta.jpg\n"),
        ("list.jsonl", '{"uri":"a.jpg","label":"cat","n":{"deep":[1]}}\n'),
        ("list.JSONL", '{"label":"cat","uri":"a.jpg"}'),
        ("mixed.jsonl", '{"uri":"a.jpg","label":"cat","n":1}\n{"uri":"b.jpg","label":"dog","n":"one"}'),
        ("long.jsonl", json.dumps({"uri": "a.jpg", "label": "cat", "caption": "x" * 3_000_000})),
        ("long.csv", f"uri,label,caption\na.jpg,cat,{'x' * 3_000_000}\n"),
    ],
)
def test_lists_of_every_format_and_suffix_case_are_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert rows(tmp_path / name)[0] == (f"{tmp_path}/a.jpg", "cat")


def test_parquet_list_with_upper_case_suffix_is_read(tmp_path: Path) -> None:
    table = pa.table({"uri": ["a.jpg"], "label": pa.array(["cat"]).dictionary_encode(), "bytes": [b"x"]})
    pq.write_table(table, tmp_path / "list.PARQUET")
    assert rows(tmp_path / "list.PARQUET") == [(f"{tmp_path}/a.jpg", "cat")]


NAMES = ["NA", "null", "NULL", "nan", "NaN", "N/A", "None", "", "DE"]


@pytest.mark.parametrize("form", ["plain", "quoted", "tsv", "jsonl"])
def test_labels_that_look_like_nulls_are_strings(form: str, tmp_path: Path) -> None:
    labels = [name for name in NAMES if name]
    path = tmp_path / f"list.{'csv' if form in ('plain', 'quoted') else form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps({"uri": "a.jpg", "label": label}) for label in labels))
    else:
        separator, quote = ("\t" if form == "tsv" else ","), ('"' if form == "quoted" else "")
        path.write_text("\n".join(separator.join(("a.jpg", f"{quote}{label}{quote}")) for label in ("label", *labels)))
        path.write_text(path.read_text().replace(f"a.jpg{separator}{quote}label", f"uri{separator}{quote}label", 1))
    assert [label for _, label in rows(path)] == labels


def test_numeric_labels_keep_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uri,label\na.jpg,007\n")
    (tmp_path / "a.jsonl").write_text('{"uri":"a.jpg","label":7}\n{"uri":"b.jpg","label":8}\n')
    (tmp_path / "date.jsonl").write_text('{"uri":"a.jpg","label":"2024-01-01"}')
    assert [rows(tmp_path / name)[0][1] for name in ("a.csv", "a.jsonl", "date.jsonl")] == ["007", "7", "2024-01-01"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "uri,label,label\na.jpg,cat,1\n", "more than one column 'label'"),
        ("list.csv", "uri,label,uri\na.jpg,cat,b\n", "more than one column 'uri'"),
        ("list.tsv", "uri\turi\tlabel\na\ta\tb\n", "more than one column 'uri'"),
        ("list.jsonl", '{"uri":"a","label":"x","label":"y"}', "specified twice"),
        ("list.csv", "uri,label\na,b\nc,\n", r"row 2 has no label \(rows without one: 1\)"),
        ("list.csv", 'uri,label\na,""\n', "row 1 has no label"),
        ("list.jsonl", '{"path":"a","label":"x"}', "row 1 has no uri"),
        ("list.jsonl", '{"uri":"a","label":null}', "row 1 has no label"),
        ("list.jsonl", '{"uri":"a","label":true}', "cannot be read"),
        ("list.jsonl", "[1]", "cannot be read"),
        ("list.jsonl", "", "cannot be read"),
        ("list.csv", "", "cannot be read"),
        ("list.txt", "a.jpg cat\n", r"is a single file, .* a list ends in \.csv, \.tsv, \.jsonl, \.parquet"),
        ("list.csv.gz", "x", "is a single file"),
        ("list.json", "[]", "is a single file"),
        ("one.jpg", "x", "is a single file"),
    ],
)
def test_invalid_list_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        rows(tmp_path / name)


def test_duplicate_parquet_columns_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["uri", "label", "label"])
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(RequestError, match="more than one column 'label'"):
        rows(tmp_path / "list.parquet")


def test_entries_of_a_local_list_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    entries = {
        "a/1.jpg": f"{tmp_path}/a/1.jpg",
        "./1.jpg": f"{tmp_path}/1.jpg",
        "../1.jpg": f"{tmp_path.parent}/1.jpg",
        "/abs/x/../1.jpg": "/abs/1.jpg",
        "file:///abs/1.jpg": "/abs/1.jpg",
        "FILE:///abs/1.jpg": "/abs/1.jpg",
        "file://localhost/abs/1.jpg": "/abs/1.jpg",
        "file:/abs/1.jpg": "/abs/1.jpg",
        "~/1.jpg": "/home/someone/1.jpg",
        "~backup.jpg": f"{tmp_path}/~backup.jpg",
        "a:b.jpg": f"{tmp_path}/a:b.jpg",
        "100%20.jpg": f"{tmp_path}/100%20.jpg",
        "S3://b/x/../1.jpg": "s3://b/1.jpg",
        "s3://b/a@2x.jpg": "s3://b/a@2x.jpg",
        "http://127.0.0.1:9/1.jpg": "http://127.0.0.1:9/1.jpg",
    }
    found = rows(write_list(tmp_path / "list.csv", *entries))
    assert [uri for uri, _ in found] == list(entries.values())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("https://h/1.jpg?X-Amz-Signature=S3CRET", "signature"),
        ("https://user:S3CRET@h/1.jpg", "credentials"),
        ("abfs://c@a.dfs.core.windows.net/1.jpg?sig=S3CRET", "signature"),
        ("file://nas/share/1.jpg", "names the machine 'nas'"),
        ("s3://b/../../1.jpg", "leads above"),
        ("zip://1.jpg::/data/x.zip", "chained file systems"),
    ],
)
def test_invalid_entry_is_refused_with_its_row(entry: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        rows(write_list(tmp_path / "list.csv", "a.jpg", entry))
    assert str(caught.value).startswith(f"row 2 of {tmp_path}/list.csv: ")
    assert "S3CRET" not in str(caught.value)


@pytest.fixture
def remote_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that resolves one entry of a list in a bucket, with a fake DNS for the example hosts."""
    resolve = socket.getaddrinfo

    def resolve_example(host: str, *arguments: Any, **options: Any) -> Any:
        addresses = {"images.example.org": "93.184.215.14", "inside.example.org": "10.1.2.3"}
        return resolve(addresses.get(host, host), *arguments, **options)

    def read(entry: str, *, trust_list: bool = False, location: str = "s3://bucket/lists/list.csv") -> list[str]:
        content = write_list(tmp_path / "list.csv", entry).read_bytes()
        monkeypatch.setattr(lists, "read_bytes", lambda uri: content)
        found: list[str] = lists.read_list(location, ["uri", "label"], trust_list=trust_list)["uri"].to_pylist()
        return found

    monkeypatch.setattr(socket, "getaddrinfo", resolve_example)
    return read


FOREIGN = [
    "/etc/passwd",
    "file:///etc/passwd",
    "FILE://localhost/etc/passwd",
    "local:///etc/passwd",
    "~/.ssh/id_ed25519",
    "http://localhost/x",
    "http://127.0.0.1:8080/x",
    "http://127.1/x",
    "http://2130706433/x",
    "http://0x7f.0.0.1/x",
    "http://[::1]/x",
    "http://[::ffff:10.0.0.1]/x",
    "http://169.254.169.254/latest/meta-data",
    "http://metadata.google.internal/x",
    "http://metadata/x",
    "https://192.168.1.1/x",
    "ftp://10.0.0.1/x",
    "http://0.0.0.0/x",
    "http://inside.example.org/x",
]


@pytest.mark.parametrize("entry", FOREIGN)
def test_remote_list_may_not_name_local_files_or_private_hosts(entry: str, remote_list: Any) -> None:
    with pytest.raises(RequestError, match=r"^row 1 of s3://bucket/lists/list\.csv names .*set trust_list"):
        remote_list(entry)
    assert len(remote_list(entry, trust_list=True)) == 1


@pytest.mark.parametrize(
    ("entry", "uri"),
    [
        ("1.jpg", "s3://bucket/lists/1.jpg"),
        ("./a/../1.jpg", "s3://bucket/lists/1.jpg"),
        ("../images/1.jpg", "s3://bucket/images/1.jpg"),
        ("s3://other/1.jpg", "s3://other/1.jpg"),
        ("gs://other/1.jpg", "gs://other/1.jpg"),
        ("https://images.example.org/1.jpg?width=5", "https://images.example.org/1.jpg?width=5"),
    ],
)
def test_remote_list_may_name_public_locations(entry: str, uri: str, remote_list: Any) -> None:
    assert remote_list(entry) == [uri]


def test_list_on_a_private_host_may_name_images_on_that_host(remote_list: Any) -> None:
    location = "http://10.0.0.5/sets/list.csv"
    assert remote_list("1.jpg", location=location) == ["http://10.0.0.5/sets/1.jpg"]
    with pytest.raises(RequestError, match=r"the host '10\.0\.0\.6'"):
        remote_list("http://10.0.0.6/1.jpg", location=location)


@pytest.mark.parametrize(
    ("address", "is_private"),
    [
        ("10.0.0.1", True),
        ("169.254.169.254", True),
        ("224.0.0.1", True),
        ("127.1", True),
        ("0x7f.0.0.1", True),
        ("::1", True),
        ("fe80::1%lo", True),
        ("::ffff:169.254.169.254", True),
        ("ff02::1", True),
        ("8.8.8.8", False),
        ("::ffff:8.8.8.8", False),
        ("2001:4860:4860::8888", False),
    ],
)
def test_addresses_that_are_not_public_are_private(address: str, is_private: bool) -> None:
    assert private_hosts({address}) == ({address} if is_private else set())


@pytest.mark.parametrize(
    ("host", "is_private"),
    [("printer", True), ("printer.LAN.", True), ("vault.internal", True), ("nosuch.invalid", False)],
)
def test_names_of_private_networks_are_private(host: str, is_private: bool) -> None:
    assert private_hosts({host}) == ({host} if is_private else set())


def test_nonexistent_hosts_are_not_private() -> None:
    assert private_hosts({"nosuch.invalid", "127.0.0.1"}) == {"127.0.0.1"}


def test_evaluate_accepts_trust_list() -> None:
    config = parse_config(EvaluateConfig, ["--input.uri", "s3://b/list.csv", "--input.trust_list", "true"])
    assert config.input.trust_list


def test_entries_of_a_list_in_a_bucket_are_relative_to_the_bucket(store: ObjectStore, tmp_path: Path) -> None:
    location = f"s3://scratch/{tmp_path.name}/lists/list.CSV"
    write_bytes(location, b"uri,label\n../images/./1.jpg,NA\n")
    assert rows(location) == [(f"s3://scratch/{tmp_path.name}/images/1.jpg", "NA")]
    write_bytes(location, b"uri,label\n/etc/passwd,NA\n")
    with pytest.raises(RequestError, match="a file on this machine"):
        rows(location)
    assert rows(location, trust_list=True) == [("/etc/passwd", "NA")]
