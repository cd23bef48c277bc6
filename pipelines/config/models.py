"""The request of `jobs.models`."""

from pipelines.config.base import Section


class ModelsConfig(Section):
    """Print the ECA family: what the model cards say beside what this installation measures."""

    names: list[str] = []
    """timm names to print, the ECA ResNets or any other classifier. Default: the whole ECA ResNet family."""
