"""Which errors of a training worker are worth a restart."""

import pytest
from ray.exceptions import RayActorError, RayTaskError

from pipelines.errors import RequestError, RunError
from pipelines.training.failures import RestartPolicy, as_final
from pipelines.training.plan import plan_training

LOST = RayActorError()
DISCONNECTED = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:4242")


def raised(error: Exception) -> Exception:
    """The error, with a traceback."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error", [TypeError("x"), ValueError("x"), KeyError("x"), AssertionError("x"), ZeroDivisionError()]
)
def test_error_of_code_becomes_final(error: Exception) -> None:
    final = as_final(raised(error))
    assert isinstance(final, RunError)
    assert type(error).__name__ in str(final)


def test_error_of_code_names_its_place_in_the_package() -> None:
    assert "line" not in str(as_final(raised(TypeError("x"))))  # raised in the tests
    with pytest.raises(AttributeError) as caught:
        plan_training(None, None, 1, 1)  # type: ignore[arg-type]
    assert "(pipelines/training/plan.py, line " in str(as_final(caught.value))


@pytest.mark.parametrize(
    "error", [LOST, DISCONNECTED, OSError("disk full"), TimeoutError(), RequestError("x"), RunError("x")]
)
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    assert as_final(error) is error


def test_error_in_a_task_is_judged_by_its_cause() -> None:
    error = RayTaskError("load", "Traceback ...\nTypeError: no image", TypeError("no image")).as_instanceof_cause()
    assert isinstance(as_final(error), RunError)


@pytest.mark.parametrize("error", [RunError("it failed"), RequestError("it is wrong")])
def test_final_error_ends_the_run_whatever_other_workers_say(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        RestartPolicy().after_exception(None, {0: DISCONNECTED, 1: error})


@pytest.mark.parametrize("error", [LOST, OSError("the store does not answer")])
def test_lost_workers_and_stores_may_come_back_any_number_of_times(error: Exception) -> None:
    policy = RestartPolicy()
    for _ in range(5):
        policy.after_exception(None, {0: error})


def test_same_error_after_a_restart_without_progress_ends_the_run() -> None:
    policy = RestartPolicy()
    policy.after_exception(None, {0: RuntimeError("shapes do not match")})
    policy.after_exception(None, {0: DISCONNECTED})
    policy.after_exception(None, {0: RuntimeError("shapes do not match")})
    policy.after_report(None, [], None)
    policy.after_exception(None, {0: RuntimeError("shapes do not match")})
    with pytest.raises(RunError, match="shapes do not match, and the same after a restart"):
        policy.after_exception(None, {0: RuntimeError("shapes do not match")})
