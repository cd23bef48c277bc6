"""The request of `jobs.verify`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from pipelines.config.base import Section
from pipelines.config.sections import without_credentials


class VerifiedOutputConfig(Section):
    """What is checked."""

    uri: Annotated[str, AfterValidator(without_credentials)] = Field(min_length=1)
    """The output of a finished `infer`: a local path or `s3://bucket/prefix`."""


class VerifyConfig(Section):
    """Check an output of infer: files, schema, ids, checksums and fingerprint."""

    output: VerifiedOutputConfig
