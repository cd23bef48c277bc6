"""What runs say of themselves, and what they refuse."""

import logging
from pathlib import Path
from typing import Any

import pytest

from pipelines import run_record
from pipelines.errors import RequestError


def test_an_output_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    output = str(tmp_path)
    run_record.refuse_if_changed(output, None)
    record: dict[str, Any] = {"identity": {"fingerprint": "a"}}
    run_record.write_run(output, record)
    run_record.refuse_if_changed(output, record)
    for before in (None, {"identity": {"fingerprint": "b"}}):
        with pytest.raises(RequestError, match=r"another run worked on .* while this one began"):
            run_record.refuse_if_changed(output, before)


def test_what_differs_is_a_table_and_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = {"identity": {"model.name": "a", "topk": 5}}
    run_record.refuse_other_run("out", found, {"model.name": "a", "topk": 5})
    assert not caplog.messages
    with pytest.raises(RequestError, match="topk was 5, is 3"):
        run_record.refuse_other_run("out", found, {"model.name": "a", "topk": 3})
    assert [line.split() for line in caplog.messages[0].splitlines()] == [["was", "is"], ["topk", "5", "3"]]
