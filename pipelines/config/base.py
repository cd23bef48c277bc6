"""Base class of all schemas: frozen, without unknown keys, and with field docstrings for `--help`."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Group of keys. The docstring below a field states its effect, its unit and the meaning of its default."""

    # Outputs store the config as JSON, which has no infinity or NaN.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, allow_inf_nan=False
    )

    def is_set(self, field: str) -> bool:
        """Return whether the user set `field`, even if to its default."""
        return field in self.model_fields_set


def leaf_fields(schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the dotted names of all keys of a schema in order, each with its pydantic `FieldInfo`."""
    leaves: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            leaves |= leaf_fields(section, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = field
    return leaves


def required_leaves(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of the required keys in order. Sections with a default have no required keys."""
    leaves: list[str] = []
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        if field.is_required():
            leaves += required_leaves(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return leaves


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the schema of a section, including optional sections, or None for other keys."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
