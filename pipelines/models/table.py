"""The job `models`: the figures of the model cards next to those measured with this installation."""

from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config.models import ModelsConfig
from pipelines.models.build import build_on_meta, check_model_name, describe
from pipelines.models.catalogue import CARD_IMAGE_SIZE, FAMILY, MODEL_CARDS


def run(config: ModelsConfig) -> dict[str, Any]:
    """Measure each model, print the table, and return the same figures as the summary.

    Raises:
        RequestError: timm does not have one of the models.
    """
    names = config.names or list(FAMILY)
    for name in names:
        check_model_name(name)
    models = [measure(name) for name in names]
    print(format_table(models))
    return {"models": models}


def measure(name: str) -> dict[str, Any]:
    """Measure one model, from shapes alone.

    Returns:
        `name`, `num_params`, `num_macs` for one 256 x 256 image, `state_dict_bytes`, `input_size` and `crop_pct`
        (train), `test_input_size` and `test_crop_pct`, `interpolation`, `num_features`, `num_classes`, `tags`, and
        under `card` the model card's `num_macs` and `state_dict_bytes`, or None if there is no card.
    """
    module = build_on_meta(name)
    cfg = module.pretrained_cfg
    card = MODEL_CARDS.get(name)
    native_size = tuple(cfg["input_size"][1:])
    return {
        "name": name,
        "num_params": sum(parameter.numel() for parameter in module.parameters()),
        "num_macs": count_macs(module, native_size if cfg.get("fixed_input_size") else (CARD_IMAGE_SIZE,) * 2),
        "state_dict_bytes": sum(value.numel() * value.element_size() for value in module.state_dict().values()),
        "input_size": cfg["input_size"][-1],
        "crop_pct": cfg["crop_pct"],
        "test_input_size": (cfg.get("test_input_size") or cfg["input_size"])[-1],
        "test_crop_pct": cfg.get("test_crop_pct") or cfg["crop_pct"],
        "interpolation": cfg["interpolation"],
        "num_features": describe(module, native_size).num_features,
        "num_classes": module.num_classes,
        "tags": [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0])],
        "card": None if card is None else {"num_macs": card.num_macs, "state_dict_bytes": card.state_dict_bytes},
    }


def count_macs(module: torch.nn.Module, input_size: tuple[int, ...]) -> int:
    """Return the multiply-adds of convolutions and matrix products for one image, on any device, including `meta`."""
    device = next(module.parameters()).device
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(torch.empty(1, 3, *input_size, device=device))
    return int(counter.get_total_flops()) // 2


def format_table(models: list[dict[str, Any]]) -> str:
    """Format results of `measure` as a table, with the figures of the model card in brackets."""
    lines = [
        f"{'model':22}{'params':>9}  {'GMACs at 256 px (card)':26}{'state dict, MB (card)':26}"
        f"{'size, crop':14}{'test':14}{'features':>8}  tags"
    ]
    for model in models:
        card = model["card"] or {}
        lines.append(
            f"{model['name']:22}{model['num_params'] / 1e6:8.1f}M  "
            f"{_compare(model, card, 'num_macs', 1e9):26}{_compare(model, card, 'state_dict_bytes', 1e6):26}"
            f"{model['input_size']}, {model['crop_pct']:<8g} {model['test_input_size']}, {model['test_crop_pct']:<8g} "
            f"{model['num_features']:8}  {', '.join(model['tags']) or '-'}"
        )
    return "\n".join(lines)


def _compare(model: dict[str, Any], card: dict[str, Any], key: str, unit: float) -> str:
    comparison = f" ({card[key] / unit:.2f}, {100 * (model[key] / card[key] - 1):+.2f} %)" if card else ""
    return f"{model[key] / unit:.2f}{comparison}"
