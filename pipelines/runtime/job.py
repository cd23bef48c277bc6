"""Entry point of every job: parse the config, run, print the summary, exit with the right status."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from pipelines.config.parse import parse_config
from pipelines.errors import RequestError, RunError
from pipelines.runtime.logs import log_to_stderr, safe_streams
from pipelines.runtime.signals import end_as_interrupted

Schema = TypeVar("Schema", bound=BaseModel)

DONE, FAILED, WRONG_REQUEST = 0, 1, 2


def main(
    prog: str,
    schema: type[Schema],
    run: Callable[[Schema], Mapping[str, Any]],
    dry_run: Callable[[Schema], None] | None = None,
) -> NoReturn:
    """Run `run_job` as a whole process, which ends with its status.

    The process ends without the interpreter's teardown. All that has to be closed is closed by then, and threads of
    Ray, Arrow and obstore have been seen to crash a teardown after the summary of a job that had succeeded.
    Nobody has to read its output: a closed stdout or stderr changes neither the run nor its status.
    """
    with safe_streams():
        status = run_job(prog, schema, run, dry_run=dry_run)
        logging.shutdown()
    os._exit(status)


def run_job(
    prog: str,
    schema: type[Schema],
    run: Callable[[Schema], Mapping[str, Any]],
    argv: Sequence[str] | None = None,
    dry_run: Callable[[Schema], None] | None = None,
) -> int:
    """Run one job from its command line.

    Args:
        prog: the module's name, as in `python -m PROG`.
        schema: what the job can be told.
        run: does the job and returns its summary; called only once the config is good. It imports what is slow to
            import (torch, ray) itself, so that `--help` and refusals come at once.
        argv: arguments without the program's name; those of the process by default.
        dry_run: says what the job would do, for `--dry-run`, which prints the resolved config either way.

    Returns:
        The exit status: 0 done, 1 the run failed, 2 the request was wrong. With 0, the last line on stdout is the
        summary, one JSON object.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        from pipelines.config.help import format_help

        print(format_help(schema, prog))
        return DONE
    end_as_interrupted()
    try:
        is_dry_run = "--dry-run" in arguments
        config = parse_config(schema, [word for word in arguments if word != "--dry-run"])
        if is_dry_run:
            print(config.model_dump_json(indent=2), flush=True)
        log_to_stderr()
        if is_dry_run:
            if dry_run is not None:
                dry_run(config)
            return DONE
        summary = run(config)
    except RequestError as error:
        return _report(prog, error, WRONG_REQUEST)
    except RunError as error:
        return _report(prog, error, FAILED)
    except KeyboardInterrupt:
        return _report(prog, "interrupted; the same command goes on from what is done", FAILED)
    except Exception:
        traceback.print_exc()
        return _report(prog, "the run failed; the traceback above says where", FAILED)
    sys.stderr.flush()
    print(json.dumps(summary), flush=True)
    return DONE


def _report(prog: str, reason: object, status: int) -> int:
    print(f"{prog}: error: {' '.join(str(reason).split())}", file=sys.stderr, flush=True)
    return status
