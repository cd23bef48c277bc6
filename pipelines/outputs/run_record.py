"""Records of a run under its output: `_run.json` at the start and at the end, then `_SUCCESS`.

`_progress.json` is rewritten every few seconds, for programs that monitor the run.
"""

import datetime
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from pipelines.config.base import leaf_fields
from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.documents import Document, parse_document
from pipelines.storage.filesystem import list_names, read_bytes, remove, translate_storage_errors, write_bytes

log = logging.getLogger(__name__)

RUN_FILE = "_run.json"
SUCCESS_FILE = "_SUCCESS"
PROGRESS_FILE = "_progress.json"
PROGRESS_FORMAT = 1
ADVICE = "restore it from a backup, or write to a new output"
# Key of the identity. The names themselves are in the key `label_names` of the record.
LABEL_NAMES_KEY = "label_names_sha256"
# Key of the identity that holds the names of the columns that `outputs.columns.register` added.
REGISTERED_COLUMNS_KEY = "outputs.registered_columns"
# Keys of identities that earlier versions wrote, and their names today.
RENAMED_KEYS = {"optim.precision": "model.dtype", "optim.compile": "model.compile"}
# Length limit of a value in an error message, in characters: enough for a fingerprint, too little for hundreds of ids.
MAX_VALUE_LENGTH = 100


class RunRecord(Document):
    """Fields of `_run.json` that every job writes.

    Attributes:
        identity: Values that another run must share to resume in the same output.
        config: Resolved config.
        summary: Summary of the run, or None until it has ended.
    """

    identity: dict[str, Any]
    config: dict[str, Any] = {}
    summary: dict[str, Any] | None = None


def find_run(output_uri: str) -> dict[str, Any] | None:
    """Return the content of an output's `_run.json`, or None if no run has started there.

    Raises:
        RequestError: The location contains files that no job wrote, or `_run.json` is damaged.
    """
    with translate_storage_errors("read", output_uri):
        names = list_names(output_uri)
        if RUN_FILE not in names:
            foreign = [name for name in names if not name.startswith((".", "_manifest", "_lock"))]
            if foreign:
                raise RequestError(
                    f"{output_uri} is not empty but has no {RUN_FILE} of an earlier run (it contains {foreign[0]}): "
                    "choose an empty location"
                )
            return None
        content = read_bytes(uris.join(output_uri, RUN_FILE))
    parse_document(uris.join(output_uri, RUN_FILE), content, RunRecord, ADVICE)
    found: dict[str, Any] = json.loads(content)
    return found


def identity_of(config: BaseModel, free: Collection[str], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that two runs must share to write to the same output.

    The identity includes every config key except those that change neither a result nor its meaning, and those that
    are resolved first: the path of the weights may change, their content may not.

    Args:
        config: Config of the run.
        free: Keys (`model.weights`) and sections (`compute`) that may differ.
        resolved: Additional keys and values.
    """
    flat = _flat(config.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if not _is_below(key, free)}
    return kept | dict(resolved)


def label_names_digest(label_names: Sequence[str]) -> str:
    """Return the SHA-256 of the label names, in order."""
    return hashlib.sha256(json.dumps(list(label_names)).encode()).hexdigest()


def _is_below(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def defaults_of(schema: type[BaseModel]) -> dict[str, Any]:
    """Return the default of each key of a config schema, without those that are required or follow from other keys."""
    defaults = {key: field.default for key, field in leaf_fields(schema).items()}
    return {key: to_jsonable_python(default) for key, default in defaults.items() if default is not PydanticUndefined}


def refuse_other_run(
    output_uri: str, found: Mapping[str, Any], identity: Mapping[str, Any], schema: type[BaseModel]
) -> None:
    """Refuse to mix results of different settings in one output, and log a table of the differences.

    Args:
        output_uri: URI of the output.
        found: Content of its `_run.json`. If an earlier version wrote it, keys missing from its identity are taken from
            its config, and keys that it did not know have their default.
        identity: Identity of this run.
        schema: Schema of the config of this run.

    Raises:
        RequestError: The identities differ. The message names each key with both values.
    """
    recorded = _flat(found.get("config", {}))
    if "label_names" in found:
        recorded[LABEL_NAMES_KEY] = label_names_digest(found["label_names"])
    before = {key: recorded[key] for key in identity if key in recorded} | found["identity"]
    before = {RENAMED_KEYS.get(key, key): value for key, value in before.items()}
    before = defaults_of(schema) | {REGISTERED_COLUMNS_KEY: []} | before
    pairs = [(key, before[key], identity[key]) for key in sorted(before.keys() & identity.keys())]
    differing = [(key, _shorten(old), _shorten(new)) for key, old, new in pairs if old != new]
    if differing:
        log.info("%s", _as_table([("", "was", "is"), *differing]))
        text = "; ".join(f"{key} was {old}, is {new}" for key, old, new in differing)
        raise RequestError(f"{output_uri} holds the output of another run with different settings: {text}")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}..."


def refuse_if_changed(output_uri: str, found: Mapping[str, Any] | None) -> None:
    """Refuse to continue if the output changed between its first inspection and the acquisition of its lease.

    Args:
        output_uri: URI of the output, whose lease this run holds by now.
        found: Result of `find_run` from before the lease was acquired.

    Raises:
        RequestError: Another run wrote to the output meanwhile.
    """
    if find_run(output_uri) != found:
        raise RequestError(f"another run changed {output_uri} while this one was starting: run the same command again")


def _as_table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def is_complete(output_uri: str) -> bool:
    """Return whether a run has finished successfully."""
    return SUCCESS_FILE in list_names(output_uri)


def write_run(output_uri: str, run: Mapping[str, Any]) -> None:
    """Write `_run.json`. The first write also proves that the output is writable.

    Raises:
        RequestError: The output is not writable.
    """
    with translate_storage_errors("write to", output_uri):
        write_bytes(
            uris.join(output_uri, RUN_FILE), json.dumps({"format": RunRecord.newest_format, **run}, indent=2).encode()
        )


def write_progress(output_uri: str, figures: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
    """Write `_progress.json`: the figures and `updated_at`. A failure causes a warning and does not end the run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        content = json.dumps({"format": PROGRESS_FORMAT, "updated_at": now, **figures}).encode()
        write_bytes(uris.join(output_uri, PROGRESS_FILE), content, check)
    except Exception as error:  # file systems raise unrelated exception types
        log.warning("%s could not be written: %s", PROGRESS_FILE, error)


def mark_incomplete(output_uri: str) -> None:
    """Remove `_SUCCESS`, because rows are about to change."""
    remove(uris.join(output_uri, SUCCESS_FILE))


def mark_complete(output_uri: str) -> None:
    """Write `_SUCCESS`, the last file of a run."""
    write_bytes(uris.join(output_uri, SUCCESS_FILE), b"")
