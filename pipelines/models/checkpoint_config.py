"""Parsing and validation of the `config.json` of a timm directory."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.errors import RequestError

# Much larger than the input of any model, but small enough for a batch to fit in memory.
MAX_SIDE = 8192

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
InputSize = tuple[Annotated[int, Field(ge=1)], Side, Side]
CropPct = Annotated[float, Field(ge=0.05, le=10)]
LabelNames = list[str | int]


class _PretrainedCfg(BaseModel):
    """Values of timm's `pretrained_cfg` that define the input of a model. Null stands for timm's default."""

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
    """timm config: the architecture, and the values that differ from the model's own."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    architecture: str
    label_names: LabelNames | None = None
    pretrained_cfg: _PretrainedCfg | None = None


def parse_checkpoint_config(content: bytes, location: str) -> dict[str, Any]:
    """Parse and validate a `config.json`.

    Args:
        content: Content of the file.
        location: URI of its folder, for messages.

    Returns:
        The config exactly as it is in the file.

    Raises:
        RequestError: The file is not JSON, does not name an architecture, or has a value of a wrong type or out of
            range.
    """
    try:
        text = content.decode("utf-8-sig")
        _CheckpointConfig.model_validate_json(text)
    except UnicodeDecodeError:
        raise RequestError(f"{location}/config.json is not a timm config: it is not UTF-8 text") from None
    except ValidationError as error:
        raise RequestError(f"{location}/config.json is not a timm config: {_reason(error)}") from None
    config: dict[str, Any] = json.loads(text)
    return config


def _reason(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)[0]
    if found["loc"] == ("architecture",) and found["type"] == "missing":
        return "it does not name an architecture"
    key = ".".join(str(part) for part in found["loc"])
    return f"{key}: {found['msg']}" if key else found["msg"]
