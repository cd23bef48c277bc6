"""Reading of YAML config files, with limits that turn a hostile or broken file into a one-line error."""

import os
from typing import Any

import yaml

from pipelines.config.text import escape_controls
from pipelines.config.uri import mask
from pipelines.errors import RequestError

# A config has about a hundred keys. The limits bound time and memory for files that are not configs: `/dev/zero`, deep
# nesting, and aliases that expand exponentially ("billion laughs").
MAX_FILE_BYTES = 1024**2
MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_REASON_CHARACTERS = 300


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses duplicate keys and keys that are not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _yaml_error(f"the key {key!r} is not text: put it in quotes", key_node)
            if key in seen:
                raise _yaml_error(f"the key {key!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_config_file(path: str) -> dict[str, Any]:
    """Read the keys of a YAML file, which may be a pipe.

    Raises:
        RequestError: The file cannot be read, is not YAML, or contains no keys.
    """
    shown = escape_controls(mask(path))
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read config file {shown}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise RequestError(f"config file {shown} is larger than {MAX_FILE_BYTES:,} bytes, which is too large")
    try:
        keys = _load(content.decode("utf-8"))
    except RecursionError:
        raise RequestError(f"config file {shown} is nested too deeply") from None
    except Exception as error:  # PyYAML lets errors of int(), float() and datetime() through
        reason = escape_controls(mask(" ".join(str(error).split())))[:MAX_REASON_CHARACTERS]
        raise RequestError(f"config file {shown} is not valid YAML for a config: {reason}") from None
    if not isinstance(keys, dict):
        raise RequestError(f"config file {shown} contains no keys: write `section:` with `key: value` lines below it")
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
    """Return the number of nodes in a subtree, including `node`, after expanding aliases.

    Args:
        node: Root of the subtree.
        sizes: Cache of the size of each visited node, by id; 0 while the node is being visited.
        depth: Depth of the node in the document.

    Raises:
        yaml.YAMLError: The subtree is too large or too deep, or contains itself.
    """
    if depth > MAX_DEPTH:
        raise _yaml_error(f"nested more than {MAX_DEPTH} deep", node)
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _yaml_error("an alias contains itself", node)
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    size = 1 + sum(_expanded_size(child, sizes, depth + 1) for child in flat)
    if size > MAX_NODES:
        raise _yaml_error(f"more than {MAX_NODES:,} values after expanding aliases", node)
    sizes[id(node)] = size
    return size


def _yaml_error(text: str, node: yaml.Node) -> yaml.YAMLError:
    mark = node.start_mark
    return yaml.YAMLError(f"line {mark.line + 1}, column {mark.column + 1}: {text}")
