"""Parsing of the command line and YAML files into a validated config.

Precedence: defaults < each `--config` file in turn < command line. Environment variables are not read.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.config.base import leaf_fields, required_leaves
from pipelines.config.command_line import parse_value, show, split_arguments, unknown_key
from pipelines.config.text import escape_controls
from pipelines.config.uri import mask
from pipelines.config.yaml_file import read_config_file
from pipelines.errors import RequestError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Schema = TypeVar("Schema", bound=BaseModel)
# Enough to fix a config. Without a limit, a list of a thousand wrong items would give a thousand errors.
MAX_ERRORS = 5


def parse_config(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """Parse `argv` and the YAML files that it names, and validate them against `schema`.

    Args:
        schema: Schema of the job.
        argv: Arguments without the program name: any number of `--config FILE` and `--section.key VALUE`.

    Raises:
        RequestError: A key is unknown, a value is invalid, or a key or file is missing.
    """
    files, texts = split_arguments(schema, argv)
    keys: dict[str, Any] = {}
    for file in files:
        keys = _merged(keys, read_config_file(file))
    fields = leaf_fields(schema)
    for key, values in texts.items():
        keys = _merged(keys, _nested(key, parse_value(key, fields[key].annotation, values)))
    try:
        return schema.model_validate(keys)
    except ValidationError as error:
        # A default that could not be computed is only a consequence of wrong values for other keys.
        details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
        raise RequestError(_explain_all(schema, details)) from None


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of both. If both have a key, mappings are merged, and for other values `over` wins."""
    merged = dict(under)
    for key, value in over.items():
        earlier = merged.get(key)
        merged[key] = _merged(earlier, value) if isinstance(earlier, dict) and isinstance(value, dict) else value
    return merged


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _explain_all(schema: type[BaseModel], details: list["ErrorDetails"]) -> str:
    # Each member of a union reports its own error, for the same key.
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        by_key.setdefault(_key_of(schema, detail), []).append(detail)
    explained = [_explain(schema, key, same) for key, same in by_key.items()]
    more = [f"and {len(explained) - MAX_ERRORS} more"] if len(explained) > MAX_ERRORS else []
    return "; ".join(explained[:MAX_ERRORS] + more)


def _key_of(schema: type[BaseModel], detail: "ErrorDetails") -> str:
    """Return the key of an error, without list positions and union members."""
    key = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    return next((leaf for leaf in leaf_fields(schema) if key.startswith(f"{leaf}.")), key)


def _explain(schema: type[BaseModel], key: str, details: list["ErrorDetails"]) -> str:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return unknown_key(key, list(leaf_fields(schema)), " in a config file")
    if kind == "missing":
        needed = [leaf for leaf in required_leaves(schema) if leaf.startswith(f"{key}.")]
        return f"missing: {' and '.join('--' + leaf for leaf in needed or [key])}"
    reasons = [escape_controls(mask(detail["msg"].removeprefix("Value error, "))) for detail in details[:MAX_ERRORS]]
    reason = ", or ".join(dict.fromkeys(reasons))
    return f"{escape_controls(key)} = {show(details[0]['input'])}: {reason}" if key else reason
