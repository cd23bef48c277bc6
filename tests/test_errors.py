"""How errors are told."""

from pipelines.errors import root_cause


def test_a_failure_is_told_by_the_innermost_error_that_says_anything() -> None:
    innermost, middle, outermost = RuntimeError(), ValueError("traceback\n\nthe weights are torn "), OSError("a task")
    middle.__cause__, outermost.__cause__ = innermost, middle
    assert root_cause(outermost) == "ValueError: the weights are torn"
    assert root_cause(RuntimeError()) == "RuntimeError"


def test_of_a_traceback_in_another_process_the_first_error_is_told() -> None:
    text = (
        "ray::Map()\n  File x\nKeyError: 'id'\n\nThe above exception was the direct cause of the following exception:\n"
    )
    assert root_cause(RuntimeError(f"{text}\nRayTaskError: advice")) == "RuntimeError: KeyError: 'id'"
