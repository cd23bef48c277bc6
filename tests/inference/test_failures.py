"""Limit on failed images, and retries of failed rows."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import TRANSIENT_KINDS, RunError
from pipelines.inference.failures import FailureLimit
from pipelines.outputs.commit_log import CommitLog
from pipelines.outputs.contents import find_done
from pipelines.outputs.lease import Lease
from pipelines.outputs.reasons import MAX_REASONS
from pipelines.outputs.schema import failed_schema


def test_first_images_may_all_fail_up_to_the_limit_for_a_thousand() -> None:
    limit = FailureLimit(0.05, 1_000_000, 0, Counter())
    limit.add(0, ["empty: the object holds no bytes"] * 50)
    limit.check()
    limit.add(0, ["not_found: the object was listed but no longer exists"])
    with pytest.raises(RunError, match=r"51 of 51 images failed.*: 50 x empty: .*; 1 x not_found: "):
        limit.check()


def test_fraction_is_relative_to_the_images_done() -> None:
    limit = FailureLimit(0.05, 1_000_000, 10_000, Counter({"empty: x": 500}))
    limit.check()
    limit.add(19, [])
    limit.add(0, ["empty: x"])
    limit.check()
    limit.add(0, ["empty: x"])
    with pytest.raises(RunError, match="502 of 10021 images"):
        limit.check()


def test_message_shows_at_most_ten_reasons() -> None:
    limit = FailureLimit(0.0, 100, 0, Counter())
    for index in range(12):
        limit.add(0, [f"corrupt: {index}"] * (12 - index))
    with pytest.raises(RunError) as raised:
        limit.check()
    assert "3 x corrupt: 9" in str(raised.value)
    assert "corrupt: 10" not in str(raised.value)


def test_number_of_reasons_in_memory_is_bounded() -> None:
    limit = FailureLimit(1.0, 1_000_000, 0, Counter())
    for start in range(0, 30_000, 1000):
        limit.add(0, [f"storage_error: request {index}" for index in range(start, start + 1000)])
    assert limit.num_failed == limit.num_done == 30_000
    assert len(limit.reasons) <= MAX_REASONS + 1
    assert limit.summarize().startswith("20000 x storage_error: other reasons; 1 x ")


def test_files_with_a_retried_error_kind_are_removed_as_a_whole(tmp_path: Path) -> None:
    def write(name: str, rows: list[tuple[int, str]]) -> None:
        columns = [[index for index, _ in rows], ["u"] * len(rows), [kind for _, kind in rows], ["m"] * len(rows)]
        pq.write_table(pa.table(columns, schema=failed_schema()), tmp_path / name)

    write("failed-0.parquet", [(0, "timeout"), (3, "empty")])
    write("failed-1.parquet", [(1, "empty")])
    with Lease(str(tmp_path)) as lease:
        lease.acquire()
        assert not find_done(str(tmp_path), 4, 1, ("storage_error",)).removed
        done = find_done(str(tmp_path), 4, 1, TRANSIENT_KINDS)
        assert done.ids.missing(0, 4).tolist() == [0, 2, 3]
        assert (*done.names, *done.removed) == ("failed-1.parquet", "failed-0.parquet")
        assert done.failures == Counter({"empty: m": 1})
        CommitLog(lease.fence).begin(done.names, done.removed)
    assert {path.name for path in tmp_path.glob("*.parquet")} == {"failed-1.parquet"}
