"""What the jobs say while they work: plain lines on stderr."""

import logging
import sys


def log_to_stderr() -> None:
    """Print the package's messages as they are, from INFO up."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)
