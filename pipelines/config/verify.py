"""The request of `jobs.verify`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from pipelines.config.base import Section
from pipelines.config.sections import without_credentials


class VerifiedOutputConfig(Section):
    """What is checked."""

    uri: Annotated[str, AfterValidator(without_credentials)] = Field(min_length=1)
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
