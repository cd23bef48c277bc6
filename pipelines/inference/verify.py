"""Check an output: that its files are those that were written, and that they hold each input once.

No part of it needs Ray or the model: files are read in parallel, and of each no more than one is held by a reader.
"""

import logging
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

from pipelines import run_record
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError, RunError
from pipelines.inference.commit import NUM_READERS, read_digests
from pipelines.inference.schema import FAILED, parts_schema
from pipelines.inference.write import digest_of
from pipelines.storage import uris
from pipelines.storage.filesystem import is_there, list_names, read_bytes
from pipelines.storage.manifest import find_manifest, read_manifest

log = logging.getLogger(__name__)

MAX_NAMED_IDS = 5


@dataclass(frozen=True)
class Expected:
    """What an output has to be.

    Attributes:
        output_uri: where it is.
        schemas: of the files, by their kind.
        fingerprint: in each file.
        digests: SHA-256 of each file, by its name.
        input_uris: by id.
    """

    output_uri: str
    schemas: dict[str, pa.Schema]
    fingerprint: str
    digests: dict[str, str]
    input_uris: pa.ChunkedArray


@dataclass
class FileReport:
    """What one file holds.

    Attributes:
        name: of the file.
        ids: of its rows.
        problems: what is wrong with it, a line each.
    """

    name: str
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    problems: list[str] = field(default_factory=list)


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check everything; returns the summary.

    Raises:
        RequestError: there is no output of a finished `infer`.
        RunError: something is off. Each problem is a line on stderr before.
    """
    output_uri = uris.normalize(config.output.uri)
    try:
        expected = _expected(output_uri)
    except RequestError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise RunError(f"{output_uri}: what the run says of itself is damaged: {error}") from None
    names = [name for name in list_names(expected.output_uri) if name.endswith(".parquet")]
    problems = [f"{name}: it is gone" for name in sorted(expected.digests.keys() - set(names))]
    counts = np.zeros(len(expected.input_uris), np.int32)
    num_rows: Counter[str] = Counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for report in pool.map(lambda name: check_file(expected, name), names):
            problems += report.problems
            np.add.at(counts, report.ids, 1)
            num_rows[report.name.partition("-")[0]] += len(report.ids)
    problems += _problems_of_counts(counts)
    for problem in problems:
        log.info("%s", problem)
    if problems:
        raise RunError(f"{expected.output_uri}: {len(problems)} problems, the first: {problems[0]}")
    return {
        "num_inputs": len(counts),
        "num_ok": num_rows["part"],
        "num_failed": num_rows["failed"],
        "num_files": len(names),
        "output_uri": expected.output_uri,
    }


def _expected(output_uri: str) -> Expected:
    record = run_record.find_run(output_uri) if is_there(output_uri) else None
    manifest = find_manifest(output_uri) if record else None
    digests = read_digests(output_uri) if record else None
    if record is None or manifest is None or digests is None or not run_record.is_complete(output_uri):
        raise RequestError(f"{output_uri} holds no output of a finished infer")
    identity = record["identity"]
    num_features = record["num_features"] if identity["outputs.embedding"] else 0
    return Expected(
        output_uri,
        {"part": parts_schema(identity["outputs.topk"], num_features), "failed": FAILED},
        record["fingerprint"],
        digests,
        read_manifest(output_uri, manifest)["uri"],
    )


def check_file(expected: Expected, name: str) -> FileReport:
    """Read one file and compare it with what it has to be."""
    report = FileReport(name)
    schema = expected.schemas.get(name.partition("-")[0])
    if schema is None or name not in expected.digests:
        report.problems.append(f"{name}: no run wrote it")
        return report
    content = read_bytes(uris.join(expected.output_uri, name))
    if digest_of(content) != expected.digests[name]:
        report.problems.append(f"{name}: its bytes are not those that were written")
        return report
    table = pq.read_table(pa.BufferReader(content))
    metadata = table.schema.metadata or {}
    if metadata.get(b"fingerprint", b"").decode() != expected.fingerprint:
        report.problems.append(f"{name}: its fingerprint is that of another model")
    if not table.schema.equals(schema):
        report.problems.append(f"{name}: its columns are not those of the run")
        return report
    report.problems += [f"{name}: {problem}" for problem in _problems_of_rows(expected, table)]
    ids = table["id"].to_numpy()
    report.ids = ids[(ids >= 0) & (ids < len(expected.input_uris))]
    return report


def _problems_of_rows(expected: Expected, table: pa.Table) -> Iterator[str]:
    ids = table["id"]
    is_known = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, len(expected.input_uris)))
    if not pc.all(is_known).as_py():
        yield "it has ids that no input has"
    elif not table["uri"].equals(expected.input_uris.take(ids)):
        yield "its URIs are not those of the manifest"
    for name in table.column_names:
        if table[name].null_count:
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
