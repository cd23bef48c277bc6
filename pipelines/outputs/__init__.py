"""Output directories: claim, add rows, finish, and read rows with `open_output`."""

from pipelines.outputs.output import Output as Output
from pipelines.outputs.output import open_output as open_output
