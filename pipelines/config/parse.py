"""From a command line and YAML files to a checked config.

Precedence: defaults < each `--config` file in turn < command line. The environment is no source.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.config.base import leaf_fields, required_leaves
from pipelines.config.command_line import parse_value, show, split_arguments, unknown_key
from pipelines.config.uri import escape_control, mask
from pipelines.config.yaml_file import read_config_file
from pipelines.errors import RequestError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Schema = TypeVar("Schema", bound=BaseModel)
# Enough to mend a config; a list of a thousand wrong items would otherwise be a thousand errors.
MAX_ERRORS = 5


def parse_config(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """Check `argv` and the YAML files it names against `schema`.

    Args:
        schema: the job's schema.
        argv: arguments without the program's name: `--config FILE` (any number) and `--section.key VALUE`.

    Raises:
        RequestError: an unknown key, a value that does not fit, a missing key or file.
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
        # A default that is computed from other keys says nothing new if these are wrong.
        details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
        raise RequestError(_explain_all(schema, details)) from None


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of both; where both have one, mappings are merged and `over` wins otherwise."""
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
    # The members of a union fail one by one, on the same key.
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        by_key.setdefault(_key_of(schema, detail), []).append(detail)
    explained = [_explain(schema, key, same) for key, same in by_key.items()]
    more = [f"and {len(explained) - MAX_ERRORS} more"] if len(explained) > MAX_ERRORS else []
    return "; ".join(explained[:MAX_ERRORS] + more)


def _key_of(schema: type[BaseModel], detail: "ErrorDetails") -> str:
    """Return the key that an error is about, without positions in lists and members of unions."""
    key = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    return next((leaf for leaf in leaf_fields(schema) if key.startswith(f"{leaf}.")), key)


def _explain(schema: type[BaseModel], key: str, details: list["ErrorDetails"]) -> str:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return unknown_key(key, list(leaf_fields(schema)), " in a config file")
    if kind == "missing":
        needed = [leaf for leaf in required_leaves(schema) if leaf.startswith(f"{key}.")]
        return f"missing: {' and '.join('--' + leaf for leaf in needed or [key])}"
    reasons = [escape_control(mask(detail["msg"].removeprefix("Value error, "))) for detail in details[:MAX_ERRORS]]
    reason = ", or ".join(dict.fromkeys(reasons))
    return f"{escape_control(key)} = {show(details[0]['input'])}: {reason}" if key else reason
