"""Acquire one lease from many processes at the same moment.

Usage: python -m tests.support.simultaneous_acquires OUTPUT_URI NUM_PROCESSES
"""

import json
import os
import sys

from pipelines.errors import RequestError
from pipelines.outputs.lease import Lease


def main(output_uri: str, count: int) -> None:
    """Print a JSON list with an entry for each process: null if it acquired the lease, else the error."""
    start, end = os.pipe(), os.pipe()
    outcome_read, outcome_write = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            os.close(start[1])
            os.close(end[1])
            _acquire(output_uri, start[0], end[0], outcome_write)
            os._exit(0)
    os.close(outcome_write)
    os.close(start[1])  # all processes see the end of this pipe at once
    lines: list[str | None] = []
    with os.fdopen(outcome_read) as outcomes:
        while len(lines) < count and (line := outcomes.readline()):
            lines.append(json.loads(line))
    os.close(end[1])
    print(json.dumps(lines))


def _acquire(output_uri: str, start: int, end: int, outcome: int) -> None:
    os.read(start, 1)
    with Lease(output_uri) as lease:
        try:
            lease.acquire()
            message = None
        except RequestError as error:
            message = str(error)
        os.write(outcome, (json.dumps(message) + "\n").encode())
        os.read(end, 1)  # hold the lease until all processes have tried


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
