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
from pipelines.config.uri import mask
from pipelines.errors import RequestError, RunError
from pipelines.runtime.logs import log_to_stderr, safe_streams
from pipelines.runtime.signals import announce_sigterm, interrupt_on_sigterm

Schema = TypeVar("Schema", bound=BaseModel)

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
RESUME = "run the same command again to resume"


def main(
    prog: str,
    schema: type[Schema],
    run: Callable[[Schema], Mapping[str, Any]],
    dry_run: Callable[[Schema], None] | None = None,
) -> NoReturn:
    """Run `run_job` and exit the process with its status.

    The process exits without the interpreter's teardown. All resources are closed by then, and threads of Ray, Arrow
    and obstore have been seen to crash the teardown after a successful job had printed its summary. A closed stdout or
    stderr changes neither the run nor its exit status.
    """
    with safe_streams():
        announce_sigterm(lambda: print(f"{prog}: received SIGTERM; {RESUME}", file=sys.stderr, flush=True))
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
        prog: Name of the job's module, as in `python -m PROG`.
        schema: Schema of the job's config.
        run: Function that does the job and returns its summary. It is called only with a valid config, and imports
            slow modules (torch, ray) itself, so that `--help` and config errors take little time.
        argv: Arguments without the program name. Defaults to those of the process.
        dry_run: Function that describes the run, for `--dry-run`, which prints the resolved config in any case.

    Returns:
        Exit status: 0 if the job is done, 1 if the run failed, 2 if the request was wrong. If it is 0, the last line on
        stdout is the summary, a JSON object.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        from pipelines.config.help import format_help

        print(format_help(schema, prog))
        return DONE
    interrupt_on_sigterm()
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
        return _report(prog, f"interrupted; {RESUME}", FAILED)
    except Exception:
        traceback.print_exc()
        return _report(prog, "the run failed with an unexpected error; see the traceback above", FAILED)
    sys.stderr.flush()
    print(json.dumps(summary), flush=True)
    return DONE


def _report(prog: str, reason: object, status: int) -> int:
    print(f"{prog}: error: {mask(' '.join(str(reason).split()))}", file=sys.stderr, flush=True)
    return status
