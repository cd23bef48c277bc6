"""The job `verify`: check that files are unchanged, that each input has exactly one row, and recompute a sample.

It does not need Ray, and only the sample needs the model. Files are read in parallel, one at a time per reader.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.config.sections import OutputsConfig
from pipelines.config.verify import VerifyConfig
from pipelines.errors import DamagedFileError, RequestError, RunError
from pipelines.inference.spot_check import spot_check
from pipelines.inputs.manifest import Manifest, find_manifest
from pipelines.outputs import Output
from pipelines.outputs.columns import ModelColumns, chosen_columns, floating_fields, registered, values_of
from pipelines.outputs.contents import FILES_FILE
from pipelines.outputs.file_names import kind_of
from pipelines.outputs.run_record import REGISTERED_COLUMNS_KEY, RUN_FILE
from pipelines.outputs.schema import failed_schema, parts_schema
from pipelines.outputs.writer import digest_of
from pipelines.storage import uris
from pipelines.storage.documents import Document
from pipelines.storage.filesystem import read_bytes, translate_storage_errors

log = logging.getLogger(__name__)

MAX_NAMED_IDS = 5
# Each reader holds a file and its table in memory: several GB for a large file of labels.
NUM_READERS = 2


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    fingerprint: str
    outputs: OutputsConfig
    registered_columns: list[str] = Field(alias=REGISTERED_COLUMNS_KEY, default=[])

    @model_validator(mode="before")
    @classmethod
    def _nest_outputs(cls, identity: Any) -> Any:
        """Collect the keys `outputs.*` of the identity in a section."""
        if not isinstance(identity, dict):
            return identity
        names = [name for name in OutputsConfig.model_fields if f"outputs.{name}" in identity]
        return identity | {"outputs": {name: identity[f"outputs.{name}"] for name in names}}


class _Summary(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    num_inputs: int
    num_ok: int
    num_failed: int
    num_files: int


class InferRecord(Document):
    """Fields of the `_run.json` of a finished `infer`.

    Attributes:
        identity: Values that decide the rows.
        fingerprint: Fingerprint of the model; also in the metadata of each file.
        transform: Eval transform; also in the metadata of each file.
        num_features: Length of an embedding.
        label_names: Name of each class; also in the metadata of each file.
        summary: Counts of the summary.
    """

    identity: _Identity
    fingerprint: str
    transform: dict[str, Any]
    num_features: int
    label_names: tuple[str, ...]
    summary: _Summary


@dataclass(frozen=True)
class Expected:
    """Expected content of an output.

    Attributes:
        output: Output directory.
        schemas: Schema of the files by kind, `part` or `failed`.
        metadata: Key-value metadata of each file.
        digests: SHA-256 of each file by name.
        manifest: Manifest of the output.
        inputs: `uri` and carried columns of the manifest. The id of an input is its position.
        columns: Columns that the model computed.
        num_sampled: Number of good rows of each file to recompute.
    """

    output: Output
    schemas: dict[str, pa.Schema]
    metadata: dict[bytes, bytes]
    digests: dict[str, str]
    manifest: Manifest
    inputs: pa.Table
    columns: tuple[ModelColumns, ...]
    num_sampled: int


@dataclass
class FileReport:
    """Result of checking one file.

    Attributes:
        name: Name of the file.
        ids: Ids of its rows.
        problems: Problems of the file, one line each.
        sample: Rows to recompute; None if there are none.
    """

    name: str
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    problems: list[str] = field(default_factory=list)
    sample: pa.Table | None = None


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check an output, and return the summary.

    Raises:
        RequestError: The URI is not the output of a finished `infer`.
        RunError: The output has problems. Each of them is logged.
    """
    output = Output(uris.normalize(config.output.uri))
    try:
        raw, record = _read_record(output)
        expected = _read_expected(output, record, config.sample.num_rows)
    except DamagedFileError as error:
        raise RunError(str(error)) from None
    with translate_storage_errors("list", output.uri, RunError):
        names = output.list_parquet_paths()
    problems = [f"{name}: the file is missing" for name in sorted(expected.digests.keys() - set(names))]
    counts = np.zeros(expected.inputs.num_rows, np.int32)
    num_rows: Counter[str] = Counter()
    samples: list[pa.Table] = []
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for report in pool.map(lambda name: check_file(expected, name), names):
            problems += report.problems
            np.add.at(counts, report.ids, 1)
            num_rows[kind_of(report.name)] += len(report.ids)
            samples += [report.sample] if report.sample is not None else []
    problems += _check_counts(counts)
    found = {
        "num_inputs": len(counts),
        "num_ok": num_rows["part"],
        "num_failed": num_rows["failed"],
        "num_files": len(names),
    }
    if record.identity.fingerprint != record.fingerprint:
        problems.append(f"{RUN_FILE}: its two fingerprints differ")
    problems = problems or _compare_summary(record, found)  # missing or extra files would make the counts differ too
    sample = _choose_sample(samples, config.sample.num_rows) if samples and not problems else None
    if sample is not None:
        problems += spot_check(raw, expected.manifest, sample, expected.columns)
    for problem in problems:
        log.info("%s", problem)
    if problems:
        raise RunError(f"{output.uri} has {len(problems)} problems, the first is: {problems[0]}")
    return found | {"num_sampled": 0 if sample is None else sample.num_rows, "output_uri": output.uri}


def _choose_sample(samples: list[pa.Table], num_rows: int) -> pa.Table:
    """Return rows from all files, the same ones in every check."""
    rows = pa.concat_tables(samples)
    count = min(num_rows, rows.num_rows)
    return rows.take(np.sort(np.random.default_rng(0).choice(rows.num_rows, count, replace=False)))


def _read_record(output: Output) -> tuple[dict[str, Any], InferRecord]:
    found = output.find_run()
    if found is None or not output.is_complete():
        raise RequestError(f"{output.uri} is not the output of a finished jobs.infer run: check --output.uri")
    record = output.read_run(InferRecord)
    before, now = record.identity.registered_columns, [columns.name for columns in registered]
    if before != now:
        raise RequestError(f"{output.uri} has the registered columns {before}, but this process registered {now}")
    return found, record


def _read_expected(output: Output, record: InferRecord, num_sampled: int) -> Expected:
    manifest, digests = find_manifest(output.manifest_uri), output.read_digests()
    if manifest is None or digests is None:
        missing = "_manifest/manifest.json" if manifest is None else FILES_FILE
        raise RunError(f"{output.uri} is marked as finished, but {missing} is missing")
    columns = chosen_columns(record.identity.outputs)
    num_parts = sum(kind_of(name) == "part" for name in digests)
    metadata = {
        "fingerprint": record.fingerprint,
        "transform": json.dumps(record.transform),
        "label_names": json.dumps(record.label_names),
    }
    return Expected(
        output,
        {
            "part": parts_schema(columns, record, manifest.carried),
            "failed": failed_schema(manifest.carried),
        },
        {name.encode(): value.encode() for name, value in metadata.items()},
        digests,
        manifest,
        manifest.table().select(["uri", *manifest.carried.names]),
        columns,
        math.ceil(num_sampled / max(1, num_parts)),
    )


def _compare_summary(record: InferRecord, found: dict[str, int]) -> list[str]:
    """Compare the counts in `_run.json` with those of the files, and return the differences, one line each."""
    recorded = {name: getattr(record.summary, name) for name in found}
    return [
        f"{RUN_FILE}: {name} is {recorded[name]}, but the files contain {value}"
        for name, value in found.items()
        if recorded[name] != value
    ]


def check_file(expected: Expected, name: str) -> FileReport:
    """Read one file, and compare it with its expected content."""
    report = FileReport(name)
    schema = expected.schemas.get(kind_of(name))
    if schema is None or name not in expected.digests:
        report.problems.append(f"{name}: the run did not write this file")
        return report
    content = read_bytes(expected.output.uri_of(name))
    if digest_of(content) != expected.digests[name]:
        report.problems.append(f"{name}: checksum mismatch, the file has changed since it was written")
        return report
    table = pq.read_table(pa.BufferReader(content))
    metadata = table.schema.metadata or {}
    for key, value in expected.metadata.items():
        if metadata.get(key) != value:
            report.problems.append(f"{name}: the {key.decode()} in its metadata differs from {RUN_FILE}")
    if not table.schema.equals(schema):
        report.problems.append(f"{name}: the columns differ from those of the run")
        return report
    report.problems += [f"{name}: {problem}" for problem in _check_rows(expected, table)]
    ids = table["id"].to_numpy()
    report.ids = ids[(ids >= 0) & (ids < expected.inputs.num_rows)]
    if kind_of(name) == "part" and expected.num_sampled:
        # The seed is the file's name, so that every check recomputes the same rows.
        rng = np.random.default_rng(list(name.encode()))
        count = min(expected.num_sampled, table.num_rows)
        report.sample = table.take(rng.choice(table.num_rows, count, replace=False))
    return report


def _check_rows(expected: Expected, table: pa.Table) -> Iterator[str]:
    ids = table["id"]
    is_known = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, expected.inputs.num_rows))
    if not pc.all(is_known).as_py():
        yield "some ids are not in the manifest"
    else:
        for name in expected.inputs.column_names:
            if not table[name].equals(expected.inputs[name].take(ids)):
                yield f"the values of {name} differ from the manifest"
    floating = {field.name for field in floating_fields(table.schema)}
    for name in (name for name in table.column_names if name not in expected.manifest.carried.names):
        if table[name].null_count:
            yield f"{name} has nulls"
        elif name in floating and not _is_finite(table[name]):
            yield f"{name} has NaN or infinite values"


def _is_finite(column: pa.ChunkedArray) -> bool:
    return all(np.isfinite(values_of(chunk)).all() for chunk in column.chunks)


def _check_counts(counts: NDArray[np.int32]) -> Iterator[str]:
    """Check that every input has exactly one row.

    Args:
        counts: Number of rows of each input.
    """
    for predicate, is_wrong in (("have no row", counts == 0), ("have more than one row", counts > 1)):
        ids = np.flatnonzero(is_wrong)
        if len(ids):
            yield f"{len(ids)} inputs {predicate}: ids {', '.join(map(str, ids[:MAX_NAMED_IDS]))}"
