"""Command-line jobs. `python -m jobs.NAME --help` lists the keys of a job."""
