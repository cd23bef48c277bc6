"""`--help`: every key with its type, its default and the docstring of its field."""

import textwrap
import types
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from pipelines.config.base import leaf_fields, required_leaves

WIDTH = 100


def format_help(schema: type[BaseModel], prog: str) -> str:
    """Return the help text of a job, made from its schema."""
    lines = [
        f"usage: python -m {prog} [--config FILE]... [--section.key VALUE]... [--dry-run]",
        "",
        *textwrap.wrap(" ".join((schema.__doc__ or "").split()), WIDTH),
        "",
        "  --config FILE    YAML file or pipe with the keys below; may be given several times, later files win",
        "  --dry-run        print the resolved config and stop",
        "  --help           print this text and stop",
    ]
    section, required = None, required_leaves(schema)
    for key, field in leaf_fields(schema).items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", f"{section}:"] if section else [""]
        lines.append(f"  --{key} {_type_name(field.annotation)}{' (required)' if key in required else ''}")
        text = " ".join((field.description or "").replace("`", "").split())
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) is types.UnionType:
        return " or ".join(_type_name(arg) for arg in get_args(annotation) if arg is not type(None))
    if annotation == list[str]:
        return "TEXT (once for each)"
    if get_origin(annotation) is list:
        return f"{_type_name(get_args(annotation)[0])}[,...]"
    return {bool: "true|false", str: "TEXT", int: "N", float: "X"}.get(annotation, str(annotation))
