"""From a command line and YAML files to a checked config.

Precedence: defaults < each `--config` file in turn < command line. The environment is no source.
"""

import difflib
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config.base import leaf_fields
from pipelines.errors import RequestError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Schema = TypeVar("Schema", bound=BaseModel)


def parse_config(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """Check `argv` and the YAML files it names against `schema`.

    Args:
        schema: the job's schema.
        argv: arguments without the program's name: `--config FILE` (any number) and `--section.key VALUE`.

    Raises:
        RequestError: a key nobody knows, a value that does not fit, a missing key or file.
    """
    files, flags = _split_config_files(argv)
    _refuse_unknown_flags(schema, flags)
    for file in files:
        _refuse_unreadable_file(file)
    try:
        return _read_sources(schema, files, flags)
    except ValidationError as error:
        raise RequestError("; ".join(_explain(schema, detail) for detail in error.errors())) from None


def _split_config_files(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[], type=Path)
    try:
        known, rest = parser.parse_known_args(list(argv))
    except Exception as error:  # argparse.ArgumentError and, before Python 3.12, its relatives
        raise RequestError(f"{error}") from None
    return known.config, rest


def _refuse_unknown_flags(schema: type[BaseModel], flags: Sequence[str]) -> None:
    valid = list(leaf_fields(schema))
    expects_value, last_flag = False, ""
    for token in flags:
        if expects_value and not token.startswith("--"):
            expects_value = False
            continue
        if expects_value:
            break
        key = token.partition("=")[0].removeprefix("--")
        if not token.startswith("--"):
            raise RequestError(f"cannot make sense of {token!r}: keys are given as --section.key VALUE")
        if key not in valid:
            raise RequestError(_unknown_key(key, valid))
        expects_value = "=" not in token
        last_flag = token
    if expects_value:
        raise RequestError(f"{last_flag} needs a value")


def _unknown_key(key: str, valid: Sequence[str], where: str = "") -> str:
    near = difflib.get_close_matches(key, valid, n=1)
    hint = f", did you mean {near[0]}?" if near else "."
    section = key.partition(".")[0]
    listed = [name for name in valid if name.startswith(f"{section}.")] or valid
    return f"unknown key {key}{where}{hint} Valid keys: {', '.join(listed)}"


def _refuse_unreadable_file(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RequestError(f"config file {path} holds no keys: it should read `section:` with `key: value` below")


def _read_sources(schema: type[Schema], files: list[Path], flags: list[str]) -> Schema:
    # Imported late: it doubles the start-up of `--help`, which does without it.
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

    class Settings(BaseSettings, schema):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(extra="forbid", defer_build=False)

        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], **_: Any
        ) -> tuple[Any, ...]:
            return (
                CliSettingsSource(settings_cls, cli_parse_args=flags),
                YamlConfigSettingsSource(settings_cls, yaml_file=files, deep_merge=True),
            )

    # `exclude_unset` keeps the difference between a default and the same value said by the user.
    return schema.model_validate(Settings().model_dump(exclude_unset=True))


def _explain(schema: type[BaseModel], detail: "ErrorDetails") -> str:
    key = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    if detail["type"] == "extra_forbidden":
        return _unknown_key(key, list(leaf_fields(schema)), " in a config file")
    if detail["type"] == "missing":
        needed = [leaf for leaf in leaf_fields(schema) if leaf == key or _is_required_below(schema, leaf, key)]
        return f"missing: {' and '.join('--' + leaf for leaf in needed or [key])}"
    reason = detail["msg"].removeprefix("Value error, ")
    # What is refused for the password in it is not said again with it.
    said = re.sub(r"//[^/@]*@", "//***@", repr(detail["input"]))
    return f"{key} = {said}: {reason}" if key else reason


def _is_required_below(schema: type[BaseModel], leaf: str, section: str) -> bool:
    return leaf.startswith(f"{section}.") and leaf_fields(schema)[leaf].is_required()
