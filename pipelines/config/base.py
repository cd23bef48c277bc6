"""The base of every schema: unknown keys refused, values fixed, field docstrings kept for `--help`."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of keys. The string under a field says its effect, its unit and what the default means."""

    # JSON, in which outputs keep the config, has no infinity.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, allow_inf_nan=False
    )

    def is_set(self, field: str) -> bool:
        """Whether the user gave `field`, rather than leaving it at its default."""
        return field in self.model_fields_set


def leaf_fields(schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the dotted names of all keys under a schema, each with its pydantic `FieldInfo`, in order."""
    leaves: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            leaves |= leaf_fields(section, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = field
    return leaves


def required_leaves(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of the keys that have to be given, in order; sections with a default have none."""
    leaves: list[str] = []
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        if field.is_required():
            leaves += required_leaves(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return leaves


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the schema of a section, also of one that may be None; None for other keys."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
