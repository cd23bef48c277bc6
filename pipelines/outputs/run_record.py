"""What a run says of itself under its output: `_run.json` when it starts and again when it ends, then `_SUCCESS`.

And `_progress.json` every few seconds, for programs that watch.
"""

import datetime
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.documents import Document, parse_document
from pipelines.storage.filesystem import list_names, read_bytes, remove, translate_storage_errors, write_bytes

log = logging.getLogger(__name__)

RUN_FILE = "_run.json"
SUCCESS_FILE = "_SUCCESS"
PROGRESS_FILE = "_progress.json"
PROGRESS_FORMAT = 1
ADVICE = "restore it from a copy, or write to a new output"
# Of the identity; the names themselves are in `label_names`.
LABEL_NAMES_KEY = "label_names_sha256"
# Keys of identities that earlier versions wrote, and their names today.
RENAMED_KEYS = {"optim.precision": "model.dtype", "optim.compile": "model.compile"}
# Of a value in a refusal, in characters: a fingerprint, but not hundreds of ids.
MAX_SHOWN = 100


class RunRecord(Document):
    """Fields of `_run.json` that every job writes.

    Attributes:
        identity: what another run must share to go on in the same output.
        config: the resolved config.
        summary: of a run that ended.
    """

    identity: dict[str, Any]
    config: dict[str, Any] = {}
    summary: dict[str, Any] | None = None


def find_run(output_uri: str) -> dict[str, Any] | None:
    """Return the `_run.json` of an output; None where no run began.

    Raises:
        RequestError: there is something, but no job of ours wrote it, or it is damaged.
    """
    with translate_storage_errors("read", output_uri):
        names = list_names(output_uri)
        if RUN_FILE not in names:
            foreign = [name for name in names if not name.startswith((".", "_manifest", "_lock"))]
            if foreign:
                raise RequestError(
                    f"{output_uri} is not empty, and holds no {RUN_FILE} of an earlier run: found {foreign[0]}"
                )
            return None
        content = read_bytes(uris.join(output_uri, RUN_FILE))
    parse_document(uris.join(output_uri, RUN_FILE), content, RunRecord, ADVICE)
    found: dict[str, Any] = json.loads(content)
    return found


def identity_of(config: BaseModel, free: Collection[str], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs must share to work on one output.

    Every key of the config belongs to it, except for those that change neither a result nor its meaning, and those
    whose meaning is resolved first: the path of the weights may change, their content may not.

    Args:
        config: of the run.
        free: keys (`model.weights`) and sections (`compute`) that may differ.
        resolved: more keys, with their values.
    """
    flat = _flat(config.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if not _is_below(key, free)}
    return kept | dict(resolved)


def label_names_digest(label_names: Sequence[str]) -> str:
    """Return the SHA-256 of label names, in their order."""
    return hashlib.sha256(json.dumps(list(label_names)).encode()).hexdigest()


def _is_below(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def refuse_other_run(output_uri: str, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to mix results of two kinds in one output.

    A table of what differs goes to the log.

    Args:
        output_uri: the output.
        found: its `_run.json`. One that an earlier version wrote may lack keys of the identity: they are taken from its
            config. Keys that only one of the versions knows are not compared.
        identity: of this run.

    Raises:
        RequestError: names what differs, with both values.
    """
    recorded = _flat(found.get("config", {}))
    if "label_names" in found:
        recorded[LABEL_NAMES_KEY] = label_names_digest(found["label_names"])
    before = {key: recorded[key] for key in identity if key in recorded} | found["identity"]
    before = {RENAMED_KEYS.get(key, key): value for key, value in before.items()}
    pairs = [(key, before[key], identity[key]) for key in sorted(before.keys() & identity.keys())]
    differing = [(key, _brief(old), _brief(new)) for key, old, new in pairs if old != new]
    if differing:
        log.info("%s", _as_table([("", "was", "is"), *differing]))
        text = "; ".join(f"{key} was {old}, is {new}" for key, old, new in differing)
        raise RequestError(f"{output_uri} holds the output of another run: {text}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def refuse_if_changed(output_uri: str, found: Mapping[str, Any] | None) -> None:
    """Refuse to go on from what is no longer so.

    Args:
        output_uri: the output, which is ours by now.
        found: what `find_run` said before it was.

    Raises:
        RequestError: another run worked on it meanwhile.
    """
    if find_run(output_uri) != found:
        raise RequestError(f"another run worked on {output_uri} while this one began: run the same command again")


def _as_table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def is_complete(output_uri: str) -> bool:
    """Whether a run ended well."""
    return SUCCESS_FILE in list_names(output_uri)


def write_run(output_uri: str, run: Mapping[str, Any]) -> None:
    """Write `_run.json`; the first time, this is also the proof that the output can be written.

    Raises:
        RequestError: it cannot.
    """
    with translate_storage_errors("write to", output_uri):
        write_bytes(
            uris.join(output_uri, RUN_FILE), json.dumps({"format": RunRecord.newest_format, **run}, indent=2).encode()
        )


def write_progress(output_uri: str, figures: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
    """Write `_progress.json`: the figures, and `updated_at`. Where that fails, a warning: no run ends for it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        content = json.dumps({"format": PROGRESS_FORMAT, "updated_at": now, **figures}).encode()
        write_bytes(uris.join(output_uri, PROGRESS_FILE), content, check)
    except Exception as error:  # of whatever file system
        log.warning("%s could not be written: %s", PROGRESS_FILE, error)


def mark_incomplete(output_uri: str) -> None:
    """Take `_SUCCESS` away: rows are about to be done anew."""
    remove(uris.join(output_uri, SUCCESS_FILE))


def mark_complete(output_uri: str) -> None:
    """Write `_SUCCESS`, the last file of a run."""
    write_bytes(uris.join(output_uri, SUCCESS_FILE), b"")
