"""The request of `jobs.models`."""

from pipelines.config.base import Section


class ModelsConfig(Section):
    """Print the ECA family: what the model cards say beside what this installation measures."""

    names: list[str] = []
    """timm names of classifiers to print; the whole ECA ResNet family if none is given."""
