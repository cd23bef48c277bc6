"""URIs as text: their protocol, the home directory, and the secrets that they must not contain.

This module only handles strings, so that configs can refuse a bad URI before anything slow is imported.
`pipelines.storage.uris` builds on it.
"""

import os
import re
from urllib.parse import unquote_plus

from pipelines.config.text import escape_controls

# Other names of protocols in fsspec and Hadoop.
ALIASES = {"local": "file", "s3a": "s3", "s3n": "s3"}
# Protocols of fsspec that read from a second file system, which only a chained URI can name.
WRAPPERS = ("blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip")
# Protocols whose URIs have a container before the `@`, not a user.
CONTAINER_PROTOCOLS = ("abfs", "abfss", "wasb", "wasbs")
# Whole words in a parameter name, and parts of a name, that mark its value as a secret. They cover signed URLs of S3,
# Google, Azure, CloudFront, Alibaba and Akamai, OAuth tokens, and common names of API keys.
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
        ValueError: The URI contains a secret, chains file systems, or names an unknown home directory.
    """
    refuse_secrets(uri)
    if "\0" in uri:
        raise ValueError("a URI must not contain a NUL character")
    is_chain = "::" in uri and re.search(r"^[\w+.-]+::|::[\w+.-]+://", uri)
    if is_chain or protocol_of(uri) in WRAPPERS:
        raise ValueError(
            "archives and chained file systems (`zip://...::...`) are not supported: unpack an archive first"
        )
    return expand_home(uri)


def expand_home(uri: str) -> str:
    """Return `uri` with a leading `~` or `~user` of a local path replaced by the home directory.

    Raises:
        ValueError: The home directory is unknown.
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
    """Refuse a URI that contains a user, a password or a parameter with a secret.

    Raises:
        ValueError: The URI contains one of them. The message does not contain any part of the secret.
    """
    found = _URI.match(uri)
    if not found or not _MAY_HOLD_SECRET.search(uri):
        return
    if _userinfo_end(protocol_of(uri), found["rest"]):
        raise ValueError(
            "a URI must not contain a user or password: remove it, and pass credentials by environment variables, "
            "profile or role"
        )
    for parameter in _PARAMETER.finditer(found["rest"]):
        if _names_secret(parameter["name"]):
            name = escape_controls(parameter["name"])
            raise ValueError(
                f"a URI must not contain a signature, token or key (its parameter {name}), because it would be stored "
                "with every row: remove it, and pass credentials by environment variables, profile or role"
            )


def mask(text: str) -> str:
    """Return `text` with the user, password and secret parameters of every URI in it replaced by `***`.

    Args:
        text: A URI, or a message that contains URIs.
    """
    whole = _URI.fullmatch(text)
    return _masked(whole) if whole else _URI_IN_TEXT.sub(_masked, text)


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
    """Return the position of the `@` that ends the user and password; 0 if there is none.

    A password may contain an unescaped `/`, and an object key may contain an `@`. The text before the first `/`
    decides: if it has a `:` that does not begin a port, everything up to the last `@` counts as user and password.

    Args:
        protocol: Protocol of the URI.
        rest: Text after `://`.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if authority.startswith("arn:"):  # an S3 access point
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
