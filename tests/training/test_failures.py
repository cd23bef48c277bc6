"""Restart policy for failed training workers."""

import pytest
from ray.exceptions import RayActorError, RayTaskError

from pipelines.errors import RequestError, RunError
from pipelines.training.failures import RestartPolicy, as_fatal
from pipelines.training.plan import plan_training

LOST = RayActorError()
DISCONNECTED = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:4242")


def raised(error: Exception) -> Exception:
    """Return the error with a traceback."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error", [TypeError("x"), ValueError("x"), KeyError("x"), AssertionError("x"), ZeroDivisionError()]
)
def test_code_error_becomes_fatal(error: Exception) -> None:
    fatal = as_fatal(raised(error))
    assert isinstance(fatal, RunError)
    assert type(error).__name__ in str(fatal)


def test_code_error_names_its_line_in_the_package() -> None:
    assert "line" not in str(as_fatal(raised(TypeError("x"))))  # raised in the tests
    with pytest.raises(AttributeError) as caught:
        plan_training(None, None, 1, 1)  # type: ignore[arg-type]
    assert "(pipelines/training/plan.py, line " in str(as_fatal(caught.value))


@pytest.mark.parametrize(
    "error", [LOST, DISCONNECTED, OSError("disk full"), TimeoutError(), RequestError("x"), RunError("x")]
)
def test_other_errors_are_returned_unchanged(error: Exception) -> None:
    assert as_fatal(error) is error


def test_error_in_a_task_is_judged_by_its_cause() -> None:
    error = RayTaskError("load", "Traceback ...\nTypeError: no image", TypeError("no image")).as_instanceof_cause()
    assert isinstance(as_fatal(error), RunError)


@pytest.mark.parametrize("error", [RunError("it failed"), RequestError("it is wrong")])
def test_fatal_error_ends_the_run_despite_errors_of_other_workers(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        RestartPolicy().after_exception(None, {0: DISCONNECTED, 1: error})


@pytest.mark.parametrize("error", [LOST, OSError("the store does not answer")])
def test_lost_workers_and_storage_errors_never_end_the_run(error: Exception) -> None:
    policy = RestartPolicy()
    for _ in range(5):
        policy.after_exception(None, {0: error})


def test_repeated_error_without_progress_ends_the_run() -> None:
    policy = RestartPolicy()
    policy.after_exception(None, {0: RuntimeError("shapes do not match")})
    policy.after_exception(None, {0: DISCONNECTED})
    policy.after_exception(None, {0: RuntimeError("shapes do not match")})
    policy.after_report(None, [], None)
    policy.after_exception(None, {0: RuntimeError("shapes do not match")})
    with pytest.raises(RunError, match=r"shapes do not match \(the same error occurred again after a restart\)"):
        policy.after_exception(None, {0: RuntimeError("shapes do not match")})
