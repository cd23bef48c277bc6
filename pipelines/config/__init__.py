"""Configs of the jobs: pydantic schemas, and parsing of the command line and YAML files.

Importable without torch and without Ray, so that `--help` and the error for a wrong key appear immediately.
"""
