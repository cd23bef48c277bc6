"""How errors are told."""

from pipelines.errors import root_cause


def test_a_failure_is_told_by_the_innermost_error_that_says_anything() -> None:
    innermost, middle, outermost = RuntimeError(), ValueError("traceback\n\nthe weights are torn "), OSError("a task")
    middle.__cause__, outermost.__cause__ = innermost, middle
    assert root_cause(outermost) == "ValueError: the weights are torn"
    assert root_cause(RuntimeError()) == "RuntimeError"
