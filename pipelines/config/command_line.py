"""Parsing of the command line: `--section.key VALUE` pairs, and the text of each value.

pydantic-settings is not used, because it parses every value that begins with `[` or `{` as JSON and splits text at
commas, which breaks shell patterns.
"""

import difflib
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from pipelines.config.base import leaf_fields
from pipelines.config.text import escape_controls
from pipelines.config.uri import mask
from pipelines.errors import RequestError

CONFIG_FLAG = "--config"
MAX_SHOWN_CHARACTERS = 200


def split_arguments(schema: type[BaseModel], argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split arguments into the `--config` files and the texts of each key, both in the given order.

    Raises:
        RequestError: A key is unknown, a key has no value, or a value has no key.
    """
    fields = leaf_fields(schema)
    files: list[str] = []
    texts: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        flag, has_value, value = token.partition("=")
        if not token.startswith("--"):
            raise RequestError(f"unexpected argument {show(token)}: give keys as --section.key VALUE")
        key = flag.removeprefix("--")
        if flag != CONFIG_FLAG and key not in fields:
            raise RequestError(unknown_key(key, list(fields)))
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise RequestError(f"{flag} needs a value")
            value = rest.pop(0)
        if flag == CONFIG_FLAG:
            files.append(value)
        else:
            texts.setdefault(key, []).append(value)
    return files, texts


def unknown_key(key: str, valid: Sequence[str], where: str = "") -> str:
    """Return the error message for an unknown key, with the most similar key and all keys of the section.

    Args:
        key: Unknown key.
        valid: All valid keys.
        where: Text that says where the key was found, with a leading space.
    """
    key = escape_controls(key)[:MAX_SHOWN_CHARACTERS]
    similar = difflib.get_close_matches(key, valid, n=1)
    hint = f", did you mean {similar[0]}?" if similar else "."
    section = key.partition(".")[0]
    listed = [name for name in valid if name.startswith(f"{section}.")] or valid
    return f"unknown key {key}{where}{hint} Valid keys: {', '.join(listed)}"


def show(value: object) -> str:
    """Return `value` as text that is safe in error messages: short, without secrets and control characters."""
    text = repr(mask(value)) if isinstance(value, str) else mask(repr(value))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def parse_value(key: str, annotation: Any, texts: list[str]) -> Any:
    """Parse the texts of a key into a value that pydantic can validate. Numbers stay text, which pydantic converts.

    Args:
        key: Dotted name of the key, for messages.
        annotation: Type of the key.
        texts: All texts given for the key. The last one counts, except that lists and mappings collect all of them.

    Raises:
        RequestError: The text of a list or mapping cannot be parsed.
    """
    kinds = _alternatives(annotation)
    if type(None) in kinds and texts[-1] == "null":
        return None
    if list[str] in kinds:
        # A shell pattern is a single value, even if it begins with a bracket or contains a comma.
        return [item for text in texts for item in _strings_of(text)]
    origins = {get_origin(kind) for kind in kinds}
    if dict in origins:
        return {name: value for text in texts for name, value in _mapping(key, text).items()}
    if list in origins:
        return [item for text in texts for item in _items(key, text)]
    if tuple in origins:
        return _items(key, texts[-1]) if len(texts) == 1 else texts
    return texts[-1]


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself. `Annotated` is unwrapped."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _alternatives(member)]
    return [annotation]


def _strings_of(text: str) -> list[str]:
    found = _json(text) if text.startswith("[") else None
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return found
    return [text]


def _items(key: str, text: str) -> list[Any]:
    if not text.startswith("["):
        return [item.strip() for item in text.split(",")]
    found = _json(text)
    if not isinstance(found, list):
        raise RequestError(f"{key} = {show(text)}: expected a JSON list, such as [4,16]")
    return found


def _mapping(key: str, text: str) -> dict[str, Any]:
    if not text.startswith("{"):
        pairs = [item.partition("=") for item in text.split(",")]
        if all(separator for _, separator, _ in pairs):
            return {name.strip(): value.strip() for name, _, value in pairs}
    found = _json(text)
    if not isinstance(found, dict):
        raise RequestError(f"""{key} = {show(text)}: expected a JSON object, such as {{"NAME": 1}}""")
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
