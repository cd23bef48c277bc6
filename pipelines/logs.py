"""What the jobs say while they work: plain lines on stderr."""

import functools
import logging
import os
import sys

# Lines of Ray's own processes that would bury ours: Ray Train asks a dashboard for its state, which is not always
# there, and repeats each report in full; Ray Data announces the end of each pass.
RAYS_NOISE = (
    "Failed to query Ray Train Controller actor state",
    "Reporting training result",
    "has constructor arguments in the object store",
    "Progress bars disabled",
    r"Dataset \S+ execution finished",
)
# Warnings of Ray's on the driver that ask nothing of the user, by logger and beginning.
RAYS_WARNINGS = {
    "ray._private.worker": "SIGTERM handler is not set",  # the job answers it itself
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}


def log_to_stderr() -> None:
    """Print the package's messages as they are, from INFO up, and keep Ray from printing what nobody reads.

    To be called before Ray is imported, which reads its variables then.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(RAYS_NOISE))
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)
    for name in ("aiobotocore", "botocore"):  # say where they found credentials and endpoint, in each process
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, beginning in RAYS_WARNINGS.items():
        logging.getLogger(name).addFilter(functools.partial(_is_other, beginning))


def _is_other(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)
