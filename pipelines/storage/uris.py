"""URIs as users write them: a local path, `file://`, `s3://bucket/key`, or any protocol of fsspec.

Keys are taken as they are, never percent-encoded, as s3fs and the AWS command line do. Only `.` and `..` are resolved,
as in a path.
"""

import os
import re
from collections.abc import Mapping

from pipelines.config.uri import escape_control, expand_home
from pipelines.config.uri import mask as mask
from pipelines.config.uri import protocol_of as protocol_of
from pipelines.errors import RequestError

_FILE_SCHEME = re.compile(r"(?:file|local):(?://(?P<authority>[^/]*))?(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)


def is_local(uri: str) -> bool:
    """Return whether the URI names a path of this machine."""
    return protocol_of(uri) == "file"


def normalize(uri: str) -> str:
    """Return the one spelling of a place: local paths absolute and without `file://`, no slash at the end.

    Raises:
        RequestError: a `file://` URI names another machine, a home directory is not known, or `..` leads out of the
            bucket.
    """
    if is_local(uri):
        path = _local_path(uri)
        try:
            path = os.path.abspath(expand_home(path))
        except ValueError as error:
            raise RequestError(f"{escape_control(uri)}: {error}") from None
        return path[1:] if path.startswith("//") else path
    return f"{protocol_of(uri)}://{_without_dots(uri).rstrip('/')}"


def _local_path(uri: str) -> str:
    found = _FILE_SCHEME.fullmatch(uri)
    if not found or (found["authority"] is None and found["path"] is None):
        return uri
    authority, path = found["authority"] or "", found["path"] or ""
    if authority.lower() in ("", "localhost"):
        return path
    if authority.startswith(("~", ".")):  # `file://~/images`, which is no URI, but clear
        return authority + path
    raise RequestError(f"{escape_control(uri)} names the machine {authority!r}: write file:///PATH, or the path alone")


def _without_dots(uri: str) -> str:
    """Return what follows `://` with the segments `.` and `..` resolved."""
    rest = uri.partition("://")[2]
    if "/." not in rest:
        return rest
    end = len(re.split(r"[?#]", rest, maxsplit=1)[0]) if protocol_of(uri) in ("http", "https") else len(rest)
    path, query = rest[:end], rest[end:]
    bucket, *segments = path.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == ".." and not kept:
            raise RequestError(f"{escape_control(mask(uri))} leads above {bucket}")
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
    """Return the place called `name` below `uri`."""
    return f"{uri.rstrip('/')}/{name}"


def split_bucket(uri: str) -> tuple[str, str]:
    """Return `("bucket", "a/b.jpg")` of `s3://bucket/a/b.jpg`; the key is empty for a whole bucket."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def contains(outer: str, inner: str) -> bool:
    """Return whether `inner` is `outer` or lies below it; links of this machine are followed."""
    outer, inner = _real(outer), _real(inner)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def refuse_overlap(output_uri: str, inputs: Mapping[str, str]) -> None:
    """Refuse an output that lies inside an input, where the next run would take it for input.

    Args:
        output_uri: of `output.uri`.
        inputs: the URIs of what is read, by their keys, such as `input.uri`.

    Raises:
        RequestError: names both.
    """
    for key, uri in inputs.items():
        if contains(uri, output_uri):
            raise RequestError(
                f"output.uri {output_uri} lies inside {key} {uri}: the output would be listed as input; choose a "
                "place outside it"
            )


def refuse_linked_overlap(output_uri: str, key: str, linked: Mapping[str, str]) -> None:
    """Refuse an output that a link inside an input leads to.

    Args:
        output_uri: of `output.uri`.
        key: the input's, such as `input.uri`.
        linked: real paths of folders that lie elsewhere, by the links in the input that lead to them.

    Raises:
        RequestError: names the link.
    """
    refuse_overlap(output_uri, {f"{key}, by the link {link} to": target for link, target in linked.items()})


def _real(uri: str) -> str:
    place = normalize(uri)
    return os.path.realpath(place) if is_local(place) else place
