"""The request of `jobs.verify`."""

from pydantic import Field

from pipelines.config.base import Section
from pipelines.config.sections import Uri


class VerifiedOutputConfig(Section):
    """Output to check."""

    uri: Uri
    """Output of a finished `infer`: a local path or `s3://bucket/prefix`."""


class SampleConfig(Section):
    """Sample of the rows to compute again."""

    num_rows: int = Field(default=16, ge=0)
    """Maximum number of rows that are computed again on the CPUs of this machine, with the model and the images that
    the run names. 0 computes none, for when the model or the images are gone."""


class VerifyConfig(Section):
    """Check an output of infer: files, schema, ids, checksums, fingerprint, and a sample of its rows."""

    output: VerifiedOutputConfig
    sample: SampleConfig = SampleConfig()
