"""The jobs: `python -m jobs.NAME --help` says what each can be told."""
