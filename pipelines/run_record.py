"""What a run says of itself under its output: `_run.json` when it starts and again when it ends, then `_SUCCESS`.

And `_progress.json` every few seconds, for programs that watch.
"""

import datetime
import json
import logging
from typing import Any

from pipelines.errors import RequestError
from pipelines.storage import uris
from pipelines.storage.filesystem import in_plain_words, list_names, read_bytes, remove, write_bytes

log = logging.getLogger(__name__)

RUN_FILE = "_run.json"
SUCCESS_FILE = "_SUCCESS"
PROGRESS_FILE = "_progress.json"
# Of a value in a refusal, in characters: a fingerprint, but not hundreds of ids.
MAX_SHOWN = 100


def find_run(output_uri: str) -> dict[str, Any] | None:
    """The `_run.json` of an output; None where no run began.

    Raises:
        RequestError: there is something, but no job of ours wrote it.
    """
    with in_plain_words("read", output_uri):
        names = list_names(output_uri)
        if RUN_FILE not in names:
            foreign = [name for name in names if not name.startswith((".", "_manifest", "_lock"))]
            if foreign:
                raise RequestError(
                    f"{output_uri} is not empty, and holds no {RUN_FILE} of an earlier run: found {foreign[0]}"
                )
            return None
        content = read_bytes(uris.join(output_uri, RUN_FILE))
    try:
        found: dict[str, Any] = json.loads(content)
        found["identity"].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(f"{uris.join(output_uri, RUN_FILE)} is damaged: it is not what a job wrote there") from None
    return found


def refuse_other_run(output_uri: str, found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to mix rows of two kinds in one output.

    A table of what differs goes to the log.

    Raises:
        RequestError: names what differs, with both values.
    """
    keys = sorted(found["identity"].keys() | identity.keys())
    pairs = [(key, found["identity"].get(key), identity.get(key)) for key in keys]
    differing = [(key, _brief(old), _brief(new)) for key, old, new in pairs if old != new]
    if differing:
        log.info("%s", _as_table([("", "was", "is"), *differing]))
        text = "; ".join(f"{key} was {old}, is {new}" for key, old, new in differing)
        raise RequestError(f"{output_uri} holds the output of another run: {text}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def refuse_if_changed(output_uri: str, found: dict[str, Any] | None) -> None:
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


def write_run(output_uri: str, run: dict[str, Any]) -> None:
    """Write `_run.json`; the first time, this is also the proof that the output can be written.

    Raises:
        RequestError: it cannot.
    """
    with in_plain_words("write to", output_uri):
        write_bytes(uris.join(output_uri, RUN_FILE), json.dumps(run, indent=2).encode())


def write_progress(output_uri: str, figures: dict[str, Any]) -> None:
    """Write `_progress.json`: the figures, and `updated_at`. Where that fails, a warning: no run ends for it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        write_bytes(uris.join(output_uri, PROGRESS_FILE), json.dumps({"updated_at": now, **figures}).encode())
    except Exception as error:  # of whatever file system
        log.warning("%s could not be written: %s", PROGRESS_FILE, error)


def mark_incomplete(output_uri: str) -> None:
    """Take `_SUCCESS` away: rows are about to be done anew."""
    remove(uris.join(output_uri, SUCCESS_FILE))


def mark_complete(output_uri: str) -> None:
    """Write `_SUCCESS`, the last file of a run."""
    write_bytes(uris.join(output_uri, SUCCESS_FILE), b"")
