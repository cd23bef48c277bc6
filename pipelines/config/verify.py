"""The request of `jobs.verify`."""

from pydantic import Field

from pipelines.config.base import Section
from pipelines.config.sections import Uri


class VerifiedOutputConfig(Section):
    """What is checked."""

    uri: Uri
    """The output of a finished `infer`: a local path or `s3://bucket/prefix`."""


class SampleConfig(Section):
    """Rows that are computed again."""

    num_rows: int = Field(default=16, ge=0)
    """How many rows, at most, are computed again, by the model and from the images that the run names, on the CPUs of
    this machine; 0 for none, where one of them is gone. Default: 16."""


class VerifyConfig(Section):
    """Check an output of infer: files, schema, ids, checksums, fingerprint, and a sample of its rows."""

    output: VerifiedOutputConfig
    sample: SampleConfig = SampleConfig()
