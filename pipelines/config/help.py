"""Help text of a job: every key with its type, default and field docstring."""

import textwrap
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.config.base import leaf_fields, required_leaves

WIDTH = 100


def format_help(schema: type[BaseModel], prog: str) -> str:
    """Return the help text of a job, generated from its schema."""
    lines = [
        f"usage: python -m {prog} [--config FILE]... [--section.key VALUE]... [--dry-run]",
        "",
        *textwrap.wrap(" ".join((schema.__doc__ or "").split()), WIDTH),
        "",
        "  --config FILE    YAML file or pipe with the keys below; may be repeated, and later files take precedence",
        "  --dry-run        print the resolved config and exit",
        "  --help           print this help and exit",
    ]
    section, required = None, required_leaves(schema)
    for key, field in leaf_fields(schema).items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", f"{section}:"] if section else [""]
        lines.append(f"  --{key} {describe_type(field.annotation)}{_default(field, is_required=key in required)}")
        text = " ".join((field.description or "").replace("`", "").split())
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def describe_default(field: FieldInfo) -> str:
    """Return the default as the command line takes it, or an empty string if it depends on something else."""
    return "" if field.default is None or field.default is PydanticUndefined else _as_text(field.default)


def _default(field: FieldInfo, is_required: bool) -> str:
    if is_required:
        return " (required)"
    default = describe_default(field)
    return f" (default: {default})" if default else ""


def _as_text(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case tuple() | list() | dict():
            return ",".join(map(_as_text, value)) or "none"
        case int() if value >= 10_000:
            return f"{value:_}"
        case float():
            return f"{value:.4g}"
    return str(value)


def describe_type(annotation: Any) -> str:
    """Return the placeholder for a value of a type, such as `N`, `true|false` or `{exact,fast}`."""
    if get_origin(annotation) is Annotated:
        return describe_type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return ",".join(map(describe_type, get_args(annotation)))
    if get_origin(annotation) is dict:
        return "JSON"
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in get_args(annotation) if arg is not type(None))
    if annotation == list[str]:
        return "TEXT (once for each)"
    if get_origin(annotation) is list:
        return f"{describe_type(get_args(annotation)[0])}[,...]"
    return {bool: "true|false", str: "TEXT", int: "N", float: "X"}.get(annotation, str(annotation))
