"""URIs as text: their protocol, the home directory in them, and the secrets that they must not hold.

Pure string handling that configs need, so that a bad URI is refused before anything slow is imported.
`pipelines.storage.uris` builds on it.
"""

import os
import re
from urllib.parse import unquote_plus

# Other names by which fsspec and Hadoop know a protocol.
ALIASES = {"local": "file", "s3a": "s3", "s3n": "s3"}
# Protocols of fsspec that read from a second file system, which a URI without a chain does not name.
WRAPPERS = ("blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip")
# Protocols whose URIs put a container, not a user, before the `@`.
CONTAINER_PROTOCOLS = ("abfs", "abfss", "wasb", "wasbs")
# Whole words of a parameter's name, and parts of one, that mark its value as a secret: S3's, Google's, Azure's,
# CloudFront's, Alibaba's and Akamai's signed URLs, OAuth's tokens, and what services call their keys.
SECRET_WORDS = {"auth", "bearer", "hdnea", "hdntl", "hdnts", "hmac", "jwt", "key", "pass", "pwd", "sas", "sig", "sign"}
SECRET_PARTS = (
    *("token", "secret", "passw", "passphrase", "signature", "credential", "session"),
    *("accesskey", "accessid", "apikey", "authkey", "authorization"),
)
MASK = "***"

_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
_URI = re.compile(rf"{_SCHEME}(?P<rest>.*)", re.DOTALL)
_URI_IN_TEXT = re.compile(rf"{_SCHEME}(?P<rest>\S*)")
_MAY_HOLD_SECRET = re.compile(r"[@?&;#]")
_PARAMETER = re.compile(r"(?<=[?&;#])(?P<name>[^?&;#=]+)=[^?&;#]*")


def protocol_of(uri: str) -> str:
    """Return the protocol in lower case, such as `s3`; `file` for local paths."""
    found = _URI.match(uri)
    scheme = found["scheme"].lower() if found else "file"
    return ALIASES.get(scheme, scheme)


def check_uri(uri: str) -> str:
    """Return `uri` with `~` expanded.

    Raises:
        ValueError: the URI holds a secret, chains file systems, or names a home directory that is not known.
    """
    refuse_secrets(uri)
    if "\0" in uri:
        raise ValueError("a URI may not hold a NUL character")
    is_chain = "::" in uri and re.search(r"^[\w+.-]+::|::[\w+.-]+://", uri)
    if is_chain or protocol_of(uri) in WRAPPERS:
        raise ValueError(
            "archives and chained file systems (`zip://...::...`) are not supported: unpack an archive first"
        )
    return expand_home(uri)


def expand_home(uri: str) -> str:
    """Return `uri` with a leading `~` or `~user` of a local path replaced by that home directory.

    Raises:
        ValueError: no home directory is known.
    """
    if not uri.startswith("~"):
        return uri
    expanded = os.path.expanduser(uri)
    if expanded.startswith("~"):
        raise ValueError(
            f"no home directory is known for {uri.partition('/')[0]}; write ./{uri} for a file of that name"
        )
    return expanded


def refuse_secrets(uri: str) -> None:
    """Refuse a URI that holds a user, a password or a parameter with a secret.

    Raises:
        ValueError: says which; the message holds no part of the secret.
    """
    found = _URI.match(uri)
    if not found or not _MAY_HOLD_SECRET.search(uri):
        return
    if _userinfo_end(protocol_of(uri), found["rest"]):
        raise ValueError("a URI may not hold a user or password: give credentials by the standard variables")
    for parameter in _PARAMETER.finditer(found["rest"]):
        if _names_secret(parameter["name"]):
            name = escape_control(parameter["name"])
            raise ValueError(
                f"a URI may not hold a signature, token or key (its parameter {name}): it would be written down with "
                "every row; name the object without it and give credentials by the standard variables"
            )


def mask(text: str) -> str:
    """Return `text` with the user, password and secret parameters of every URI in it replaced by `***`.

    Args:
        text: a URI, or a message that mentions some.
    """
    whole = _URI.fullmatch(text)
    return _masked(whole) if whole else _URI_IN_TEXT.sub(_masked, text)


def escape_control(text: str) -> str:
    """Return `text` with control and other unprintable characters escaped, safe to show on a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _masked(found: re.Match[str]) -> str:
    rest = found["rest"]
    end = _userinfo_end(protocol_of(found[0]), rest)
    if end:
        rest = f"{MASK}{rest[end:]}"
    rest = _PARAMETER.sub(
        lambda parameter: f"{parameter['name']}={MASK}" if _names_secret(parameter["name"]) else parameter[0], rest
    )
    return f"{found['scheme']}://{rest}"


def _userinfo_end(protocol: str, rest: str) -> int:
    """Position of the `@` that ends a user and password in what follows `://`; 0 if there is none.

    A password may hold an unescaped `/`, and a key may hold an `@`. The text before the first `/` decides: with a `:`
    that begins no port, everything up to the last `@` is taken for user and password.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if authority.startswith("arn:"):  # an access point of S3
        return 0
    if "@" in authority:
        user = authority.rpartition("@")[0]
        is_container = protocol in CONTAINER_PROTOCOLS and ":" not in user
        return 0 if is_container else rest.rindex("@", 0, len(authority))
    _, colon, port = authority.rpartition(":")
    has_port = port.isdecimal() or authority.endswith("]")
    return rest.rfind("@") if colon and not has_port and "@" in rest else 0


def _names_secret(name: str) -> bool:
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", unquote_plus(name)).lower())
    return not SECRET_WORDS.isdisjoint(words) or any(part in "".join(words) for part in SECRET_PARTS)
