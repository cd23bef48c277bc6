"""Check an output: its files are those that were written, they hold each input once, and a sample is right.

No part of it needs Ray, and only the sample needs the model. Files are read in parallel, and no reader holds more than
one of them.
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
from pydantic import BaseModel, ConfigDict, Field

from pipelines.config.verify import VerifyConfig
from pipelines.errors import DamagedFileError, RequestError, RunError
from pipelines.inference.spot_check import spot_check
from pipelines.inputs.manifest import Manifest, find_manifest
from pipelines.outputs import Output
from pipelines.outputs.contents import FILES_FILE
from pipelines.outputs.file_names import kind_of
from pipelines.outputs.run_record import RUN_FILE
from pipelines.outputs.schema import failed_schema, parts_schema
from pipelines.outputs.writer import digest_of
from pipelines.storage import uris
from pipelines.storage.documents import Document
from pipelines.storage.filesystem import read_bytes, translate_storage_errors

log = logging.getLogger(__name__)

MAX_NAMED_IDS = 5
# Each holds a file and its table, several GB of a large file of labels.
NUM_READERS = 2


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    fingerprint: str
    topk: int = Field(alias="outputs.topk", ge=0)
    embedding: bool = Field(alias="outputs.embedding")


class _Summary(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    num_inputs: int
    num_ok: int
    num_failed: int
    num_files: int


class InferRecord(Document):
    """Fields of the `_run.json` of a finished `infer`.

    Attributes:
        identity: what decides the rows.
        fingerprint: of the model; in the metadata of each file.
        transform: the eval transform; in the metadata of each file.
        num_features: length of an embedding.
        label_names: one a class; in the metadata of each file.
        summary: the counts.
    """

    identity: _Identity
    fingerprint: str
    transform: dict[str, Any]
    num_features: int
    label_names: list[str]
    summary: _Summary


@dataclass(frozen=True)
class Expected:
    """What an output has to be.

    Attributes:
        output: where it is.
        schemas: of the files, by their kind.
        metadata: of each file.
        digests: SHA-256 of each file, by its name.
        manifest: of the output.
        inputs: rows of the manifest: `uri` and the carried columns; the id of an input is its row.
        num_sampled: good rows of each file that are kept, to be computed again.
    """

    output: Output
    schemas: dict[str, pa.Schema]
    metadata: dict[bytes, bytes]
    digests: dict[str, str]
    manifest: Manifest
    inputs: pa.Table
    num_sampled: int


@dataclass
class FileReport:
    """What one file holds.

    Attributes:
        name: of the file.
        ids: of its rows.
        problems: what is wrong with it, a line each.
        sample: some of its rows.
    """

    name: str
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    problems: list[str] = field(default_factory=list)
    sample: pa.Table | None = None


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check everything; returns the summary.

    Raises:
        RequestError: there is no output of a finished `infer`.
        RunError: something is off. Each problem is a line on stderr before.
    """
    output = Output(uris.normalize(config.output.uri))
    try:
        raw, record = _record(output)
        expected = _expected(output, record, config.sample.num_rows)
    except DamagedFileError as error:
        raise RunError(str(error)) from None
    with translate_storage_errors("list", output.uri, RunError):
        names = output.list_parquet_paths()
    problems = [f"{name}: it is gone" for name in sorted(expected.digests.keys() - set(names))]
    counts = np.zeros(expected.inputs.num_rows, np.int32)
    num_rows: Counter[str] = Counter()
    samples: list[pa.Table] = []
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for report in pool.map(lambda name: check_file(expected, name), names):
            problems += report.problems
            np.add.at(counts, report.ids, 1)
            num_rows[kind_of(report.name)] += len(report.ids)
            samples += [report.sample] if report.sample is not None else []
    problems += _problems_of_counts(counts)
    found = {
        "num_inputs": len(counts),
        "num_ok": num_rows["part"],
        "num_failed": num_rows["failed"],
        "num_files": len(names),
    }
    if record.identity.fingerprint != record.fingerprint:
        problems.append(f"{RUN_FILE}: it names two fingerprints")
    problems = problems or _wrong_counts(record, found)  # other counts follow from files that came or went
    sample = _choose(samples, config.sample.num_rows) if samples and not problems else None
    if sample is not None:
        problems += spot_check(raw, expected.manifest, sample)
    for problem in problems:
        log.info("%s", problem)
    if problems:
        raise RunError(f"{output.uri}: {len(problems)} problems, the first: {problems[0]}")
    return found | {"num_sampled": 0 if sample is None else sample.num_rows, "output_uri": output.uri}


def _choose(samples: list[pa.Table], num_rows: int) -> pa.Table:
    """Rows spread over the files, the same ones in each check."""
    rows = pa.concat_tables(samples)
    count = min(num_rows, rows.num_rows)
    return rows.take(np.sort(np.random.default_rng(0).choice(rows.num_rows, count, replace=False)))


def _record(output: Output) -> tuple[dict[str, Any], InferRecord]:
    found = output.find_run()
    if found is None or not output.is_complete():
        raise RequestError(f"{output.uri} holds no output of a finished infer")
    return found, output.read_run(InferRecord)


def _expected(output: Output, record: InferRecord, num_sampled: int) -> Expected:
    manifest, digests = find_manifest(output.manifest_uri), output.read_digests()
    if manifest is None or digests is None:
        missing = "_manifest/manifest.json" if manifest is None else FILES_FILE
        raise RunError(f"{output.uri} is marked as finished, but {missing} is gone")
    identity = record.identity
    num_features = record.num_features if record.identity.embedding else 0
    num_parts = sum(kind_of(name) == "part" for name in digests)
    metadata = {
        "fingerprint": record.fingerprint,
        "transform": json.dumps(record.transform),
        "label_names": json.dumps(record.label_names),
    }
    return Expected(
        output,
        {
            "part": parts_schema(identity.topk, num_features, manifest.carried),
            "failed": failed_schema(manifest.carried),
        },
        {name.encode(): value.encode() for name, value in metadata.items()},
        digests,
        manifest,
        manifest.table().select(["uri", *manifest.carried.names]),
        math.ceil(num_sampled / max(1, num_parts)),
    )


def _wrong_counts(record: InferRecord, found: dict[str, int]) -> list[str]:
    """Compare the counts of `_run.json` with what the files hold."""
    recorded = {name: getattr(record.summary, name) for name in found}
    return [
        f"{RUN_FILE}: its {name} is {recorded[name]}, and the files hold {value}"
        for name, value in found.items()
        if recorded[name] != value
    ]


def check_file(expected: Expected, name: str) -> FileReport:
    """Read one file and compare it with what it has to be."""
    report = FileReport(name)
    schema = expected.schemas.get(kind_of(name))
    if schema is None or name not in expected.digests:
        report.problems.append(f"{name}: no run wrote it")
        return report
    content = read_bytes(expected.output.uri_of(name))
    if digest_of(content) != expected.digests[name]:
        report.problems.append(f"{name}: its bytes are not those that were written")
        return report
    table = pq.read_table(pa.BufferReader(content))
    metadata = table.schema.metadata or {}
    for key, value in expected.metadata.items():
        if metadata.get(key) != value:
            report.problems.append(f"{name}: its {key.decode()} is not that of {RUN_FILE}")
    if not table.schema.equals(schema):
        report.problems.append(f"{name}: its columns are not those of the run")
        return report
    report.problems += [f"{name}: {problem}" for problem in _problems_of_rows(expected, table)]
    ids = table["id"].to_numpy()
    report.ids = ids[(ids >= 0) & (ids < expected.inputs.num_rows)]
    if kind_of(name) == "part" and expected.num_sampled:
        # Chosen by the file's name: another check computes the same rows.
        chance = np.random.default_rng(list(name.encode()))
        count = min(expected.num_sampled, table.num_rows)
        report.sample = table.take(chance.choice(table.num_rows, count, replace=False))
    return report


def _problems_of_rows(expected: Expected, table: pa.Table) -> Iterator[str]:
    ids = table["id"]
    is_known = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, expected.inputs.num_rows))
    if not pc.all(is_known).as_py():
        yield "it has ids that no input has"
    else:
        for name in expected.inputs.column_names:
            if not table[name].equals(expected.inputs[name].take(ids)):
                yield f"its values of {name} are not those of the manifest"
    for name in table.column_names:
        if table[name].null_count and name not in expected.manifest.carried.names:
            yield f"{name} has nulls"
        elif name in ("prob", "embedding") and not _is_finite(table[name]):
            yield f"{name} has values that are no numbers"


def _is_finite(column: pa.ChunkedArray) -> bool:
    return all(np.isfinite(chunk.flatten().to_numpy()).all() for chunk in column.chunks)


def _problems_of_counts(counts: NDArray[np.int32]) -> Iterator[str]:
    for what, found in (("without a row", counts == 0), ("with more than one row", counts > 1)):
        ids = np.flatnonzero(found)
        if len(ids):
            yield f"{len(ids)} inputs {what}: ids {', '.join(map(str, ids[:MAX_NAMED_IDS]))}"
