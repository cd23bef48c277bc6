"""The `config.json` of a timm directory, checked before anything is built from it."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.errors import RequestError

# Far beyond any model's input, and small enough for a batch in memory.
MAX_SIDE = 8192

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
InputSize = tuple[Annotated[int, Field(ge=1)], Side, Side]
CropPct = Annotated[float, Field(ge=0.05, le=10)]
LabelNames = list[str | int]


class _PretrainedCfg(BaseModel):
    """Values of timm's `pretrained_cfg` that decide what a model is fed. Null stands for timm's default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    input_size: InputSize | None = None
    test_input_size: InputSize | None = None
    crop_pct: CropPct | None = None
    test_crop_pct: CropPct | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = (
        None
    )
    classifier: str | list[str] | None = None
    label_names: LabelNames | None = None


class _CheckpointConfig(BaseModel):
    """A timm config: the architecture and, where they differ from the model's own, its values."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    architecture: str
    label_names: LabelNames | None = None
    pretrained_cfg: _PretrainedCfg | None = None


def parse_checkpoint_config(content: bytes, location: str) -> dict[str, Any]:
    """Parse and check a `config.json`.

    Args:
        content: The bytes of the file.
        location: The folder it lies in, for messages.

    Returns:
        The config as it stands in the file.

    Raises:
        RequestError: It is no JSON, names no architecture, or has a value of a wrong type or out of range.
    """
    try:
        text = content.decode("utf-8-sig")
        _CheckpointConfig.model_validate_json(text)
    except UnicodeDecodeError:
        raise RequestError(f"{location}/config.json is not a timm config: it is no UTF-8 text") from None
    except ValidationError as error:
        raise RequestError(f"{location}/config.json is not a timm config: {_reason(error)}") from None
    config: dict[str, Any] = json.loads(text)
    return config


def _reason(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)[0]
    if found["loc"] == ("architecture",) and found["type"] == "missing":
        return "it names no architecture"
    key = ".".join(str(part) for part in found["loc"])
    return f"{key}: {found['msg']}" if key else found["msg"]
