"""Export of a checkpoint to a timm directory, with the weights that the run chose: the model's or its EMA's."""

import json
import posixpath
import tempfile
from pathlib import Path
from typing import Any

from pipelines.config.export import ExportConfig
from pipelines.errors import RequestError
from pipelines.images.transform import EvalTransform
from pipelines.models.build import create
from pipelines.outputs.run_record import RUN_FILE
from pipelines.storage import uris
from pipelines.storage.filesystem import download, list_names, read_bytes, translate_storage_errors, write_bytes
from pipelines.training.checkpoint import STATE_FILE, TIMM_FILES, load_state, save_timm_directory
from pipelines.training.history import EMA, MODEL


def run(config: ExportConfig) -> dict[str, Any]:
    """Export a checkpoint to `model.safetensors` and `config.json`, and return the summary.

    Raises:
        RequestError: There is no checkpoint, or the output is not empty or lies inside the data of the run.
    """
    output_uri = uris.normalize(config.output.uri)
    with translate_storage_errors("read", output_uri):
        found = list_names(output_uri)
    if found:
        raise RequestError(f"{output_uri} is not empty: found {found[0]}")
    checkpoint_uri = _find_checkpoint(uris.normalize(config.checkpoint.uri))
    uris.refuse_overlap(output_uri, _data_uris(checkpoint_uri))
    with tempfile.TemporaryDirectory() as folder:
        contents = _timm_files(checkpoint_uri, Path(folder))
    with translate_storage_errors("write to", output_uri):
        for name, content in contents.items():
            write_bytes(uris.join(output_uri, name), content)
    described = json.loads(contents["config.json"])
    return {
        "model": described["architecture"],
        "num_classes": described["num_classes"],
        "checkpoint_uri": checkpoint_uri,
        "output_uri": output_uri,
    }


def _find_checkpoint(uri: str) -> str:
    with translate_storage_errors("read", uri):
        names = list_names(uri)
        record = json.loads(read_bytes(uris.join(uri, RUN_FILE))) if RUN_FILE in names else None
    if record is None:
        if STATE_FILE not in names and not set(TIMM_FILES) <= set(names):
            raise RequestError(f"no checkpoint at {uri}: found neither {STATE_FILE} nor {' and '.join(TIMM_FILES)}")
        return uri
    if "checkpoint_uri" not in record.get("summary", {}):
        raise RequestError(f"the run at {uri} has not finished: set checkpoint.uri to one of its checkpoints")
    return str(record["summary"]["checkpoint_uri"])


def _data_uris(checkpoint_uri: str) -> dict[str, str]:
    """Return the data URIs of the run that wrote a checkpoint, by config key; empty if its record is missing."""
    record_uri = uris.join(posixpath.dirname(checkpoint_uri), RUN_FILE)
    try:
        data = json.loads(read_bytes(record_uri))["config"]["data"]
        return {f"data.{name}.uri": data[name]["uri"] for name in ("train", "validation") if data.get(name)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def chosen_weights(state: dict[str, Any]) -> str:
    """Return the run's choice of weights, `EMA` or `MODEL`. Older checkpoints only hold it per epoch."""
    if state["learner"]["state_dict_ema"] is None:
        return MODEL
    last = state["history"][-1] if state.get("history") else {}
    return str(state.get("handed_out", last.get("of", EMA)))


def _timm_files(checkpoint_uri: str, folder: Path) -> dict[str, bytes]:
    with translate_storage_errors("read the checkpoint", checkpoint_uri):
        if set(TIMM_FILES) <= set(list_names(checkpoint_uri)):
            return {name: read_bytes(uris.join(checkpoint_uri, name)) for name in TIMM_FILES}
        state = load_state(Path(download(uris.join(checkpoint_uri, STATE_FILE), str(folder))).parent)
    described, learner = state["model"], state["learner"]
    module = create(described["name"], len(described["class_names"]))
    module.load_state_dict(learner["state_dict_ema" if chosen_weights(state) == EMA else "state_dict"])
    transform = EvalTransform(**described["transform"])
    save_timm_directory(folder, module, tuple(described["class_names"]), transform)
    return {name: (folder / name).read_bytes() for name in TIMM_FILES}
