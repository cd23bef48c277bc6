"""A job that counts labels, as somebody outside this project would write it: an example of the page "Extend it"."""

from collections import Counter
from typing import Any

from pydantic import Field

from pipelines.config.base import Section
from pipelines.config.sections import Uri
from pipelines.runtime.job import main


class CountedOutputConfig(Section):
    """Output to read."""

    uri: Uri
    """Output of `infer`: a local path or `s3://bucket/prefix`."""


class LabelCountsConfig(Section):
    """Count how often each label comes first in an output of infer."""

    output: CountedOutputConfig

    min_prob: float = Field(default=0.0, ge=0, le=1)
    """Smallest probability of the first label for a row to be counted."""


def count_labels(config: LabelCountsConfig) -> dict[str, Any]:
    """Run the job; returns the summary."""
    from pipelines.outputs import open_output  # late: Arrow takes time to import, and --help should answer at once

    counts: Counter[str] = Counter()
    for batch in open_output(config.output.uri).batches(["label", "prob"]):
        rows = zip(batch["label"].to_pylist(), batch["prob"].to_pylist())
        counts.update(labels[0] for labels, probs in rows if probs[0] >= config.min_prob)
    return {"num_counted": counts.total(), "counts": dict(counts.most_common())}


if __name__ == "__main__":
    main("jobs.label_counts", LabelCountsConfig, count_labels)
