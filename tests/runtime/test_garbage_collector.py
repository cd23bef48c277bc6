"""Pausing of the garbage collector."""

import gc

import pytest

from pipelines.runtime.garbage_collector import paused_gc


def test_collector_is_paused_within_the_block_only() -> None:
    frozen = gc.get_freeze_count()
    try:
        with paused_gc():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_collector_resumes_after_an_error() -> None:
    try:
        with pytest.raises(ValueError, match="broken"), paused_gc():
            raise ValueError("broken")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
