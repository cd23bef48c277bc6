"""Protocol of the config sections that the engine reads."""

from typing import Protocol

from pipelines.config.sections import ComputeConfig, ModelConfig, PreprocessConfig


class _InputConfig(Protocol):
    @property
    def max_bytes(self) -> int: ...


class EngineConfig(Protocol):
    """Sections of a job's config that the engine reads."""

    @property
    def input(self) -> _InputConfig:
        """Section `input`."""

    @property
    def model(self) -> ModelConfig:
        """Section `model`."""

    @property
    def preprocess(self) -> PreprocessConfig:
        """Section `preprocess`."""

    @property
    def compute(self) -> ComputeConfig:
        """Section `compute`."""
