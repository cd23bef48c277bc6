"""Check an output of jobs.infer against its manifest and its checksums."""

from typing import Any

from pipelines.config.verify import VerifyConfig
from pipelines.runtime.job import main


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Run the job, and return the summary."""
    from pipelines.inference.verify import run  # late: pyarrow

    return run(config)


if __name__ == "__main__":
    main("jobs.verify", VerifyConfig, verify)
