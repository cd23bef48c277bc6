"""Config files: YAML, read once, with the limits that keep a hostile or broken file to one line of error."""

import os
from typing import Any

import yaml

from pipelines.config.uri import escape_control, mask
from pipelines.errors import RequestError

# A config has some hundred keys. The limits bound time and memory for what is none: `/dev/zero`, deep nesting, and
# aliases that multiply ("billion laughs").
MAX_FILE_BYTES = 1024**2
MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_REASON_CHARACTERS = 300


class _Loader(yaml.SafeLoader):
    """Safe YAML whose mappings have text keys, each once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"the key {key!r} is not text; put it in quotes", key_node)
            if key in seen:
                raise _problem(f"the key {key!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_config_file(path: str) -> dict[str, Any]:
    """Return the keys of one YAML file, which may be a pipe.

    Raises:
        RequestError: the file cannot be read, is not YAML, or holds no keys.
    """
    shown = escape_control(mask(path))
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read config file {shown}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise RequestError(f"config file {shown} is larger than {MAX_FILE_BYTES:,} bytes: it is no config")
    try:
        keys = _load(content.decode("utf-8"))
    except RecursionError:
        raise RequestError(f"config file {shown} is nested too deeply: it is no config") from None
    except Exception as error:  # PyYAML also lets through what int(), float() and datetime() raise
        reason = escape_control(mask(" ".join(str(error).split())))[:MAX_REASON_CHARACTERS]
        raise RequestError(f"config file {shown} is not YAML as a config needs it: {reason}") from None
    if not isinstance(keys, dict):
        raise RequestError(f"config file {shown} holds no keys: it should read `section:` with `key: value` below")
    return keys


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {}, depth=0)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Number of nodes below and with `node`, aliases expanded; `sizes` keeps it for each node already seen.

    Raises:
        yaml.YAMLError: it is too large, too deep, or holds itself.
    """
    if depth > MAX_DEPTH:
        raise _problem(f"nested more than {MAX_DEPTH} deep", node)
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _problem("an alias holds itself", node)
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    size = 1 + sum(_expanded_size(child, sizes, depth + 1) for child in flat)
    if size > MAX_NODES:
        raise _problem(f"more than {MAX_NODES:,} values, aliases expanded", node)
    sizes[id(node)] = size
    return size


def _problem(text: str, node: yaml.Node) -> yaml.YAMLError:
    mark = node.start_mark
    return yaml.YAMLError(f"line {mark.line + 1}, column {mark.column + 1}: {text}")
