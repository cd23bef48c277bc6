"""The request of `jobs.export`."""

from pipelines.config.base import Section
from pipelines.config.sections import Uri


class ExportCheckpointConfig(Section):
    """What is exported."""

    uri: Uri
    """A checkpoint written by train, or the output of a finished run, whose best checkpoint is then taken: a local path
    or `s3://bucket/prefix`."""


class ExportOutputConfig(Section):
    """Where the result goes."""

    uri: Uri
    """Folder or prefix for `model.safetensors` and `config.json`; has to be empty."""


class ExportConfig(Section):
    """Write a checkpoint as a timm directory, for `timm.create_model('local-dir:...', pretrained=True)`."""

    checkpoint: ExportCheckpointConfig
    output: ExportOutputConfig
