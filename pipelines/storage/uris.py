"""URIs as users write them: a local path, `file://`, `s3://bucket/key`, or any fsspec protocol.

Keys are used literally, without percent-decoding, as in s3fs and the AWS CLI. Only `.` and `..` segments are resolved,
as in a path.
"""

import os
import re
from collections.abc import Mapping

from pipelines.config.text import escape_controls
from pipelines.config.uri import expand_home
from pipelines.config.uri import mask as mask
from pipelines.config.uri import protocol_of as protocol_of
from pipelines.errors import RequestError

_FILE_SCHEME = re.compile(r"(?:file|local):(?://(?P<authority>[^/]*))?(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)


def is_local(uri: str) -> bool:
    """Return whether a URI names a path on this machine."""
    return protocol_of(uri) == "file"


def normalize(uri: str) -> str:
    """Return the canonical form of a URI: local paths absolute and without `file://`, no trailing slash.

    Raises:
        RequestError: A `file://` URI names another machine, a home directory is unknown, or `..` leads out of the
            bucket.
    """
    if is_local(uri):
        path = _local_path(uri)
        try:
            path = os.path.abspath(expand_home(path))
        except ValueError as error:
            raise RequestError(f"{escape_controls(uri)}: {error}") from None
        return path[1:] if path.startswith("//") else path
    return f"{protocol_of(uri)}://{_without_dots(uri).rstrip('/')}"


def _local_path(uri: str) -> str:
    found = _FILE_SCHEME.fullmatch(uri)
    if not found or (found["authority"] is None and found["path"] is None):
        return uri
    authority, path = found["authority"] or "", found["path"] or ""
    if authority.lower() in ("", "localhost"):
        return path
    if authority.startswith(("~", ".")):  # `file://~/images` is not a valid URI, but its meaning is clear
        return authority + path
    raise RequestError(f"{escape_controls(uri)} names the machine {authority!r}: write file:///PATH, or the path alone")


def _without_dots(uri: str) -> str:
    """Return the part of a URI after `://`, with `.` and `..` segments resolved."""
    rest = uri.partition("://")[2]
    if "/." not in rest:
        return rest
    end = len(re.split(r"[?#]", rest, maxsplit=1)[0]) if protocol_of(uri) in ("http", "https") else len(rest)
    path, query = rest[:end], rest[end:]
    bucket, *segments = path.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == ".." and not kept:
            raise RequestError(f"{escape_controls(mask(uri))} leads above {bucket}")
        if segment == "..":
            kept.pop()
        elif segment != ".":
            kept.append(segment)
    return "/".join([bucket, *kept]) + query


def as_text(path: str) -> str:
    r"""Return a local path as UTF-8 can hold it: bytes that are not UTF-8 become `\xe9`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path).decode(errors="backslashreplace")
    return path


def is_escaped(path: str) -> bool:
    """Return whether a local path is what `as_text` makes of the path of a file that exists."""
    text = path.encode()
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), text)
    return raw != text and os.path.lexists(raw)


def join(uri: str, name: str) -> str:
    """Return the URI of `name` below `uri`."""
    return f"{uri.rstrip('/')}/{name}"


def split_bucket(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/a/b.jpg` into `("bucket", "a/b.jpg")`. The key of a whole bucket is empty."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def contains(outer: str, inner: str) -> bool:
    """Return whether `inner` is `outer` or lies below it, after resolving local symbolic links."""
    outer, inner = _real(outer), _real(inner)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def refuse_overlap(output_uri: str, inputs: Mapping[str, str]) -> None:
    """Refuse an output inside an input, because the next run would list the output as input.

    Args:
        output_uri: Value of `output.uri`.
        inputs: URIs of the inputs by their config keys, such as `input.uri`.

    Raises:
        RequestError: The output lies inside an input.
    """
    for key, uri in inputs.items():
        if contains(uri, output_uri):
            raise RequestError(
                f"output.uri {output_uri} lies inside {key} {uri}: the output would be listed as input; choose a "
                "location outside it"
            )


def refuse_linked_overlap(output_uri: str, key: str, linked: Mapping[str, str]) -> None:
    """Refuse an output that a symbolic link inside an input points to.

    Args:
        output_uri: Value of `output.uri`.
        key: Config key of the input, such as `input.uri`.
        linked: Real paths of folders outside the input, by the links in the input that point to them.

    Raises:
        RequestError: A link points to the output or to a folder above it.
    """
    refuse_overlap(output_uri, {f"{key}, by the link {link} to": target for link, target in linked.items()})


def _real(uri: str) -> str:
    normalized = normalize(uri)
    return os.path.realpath(normalized) if is_local(normalized) else normalized
