"""What the jobs can be told: pydantic schemas, and the way from command line and YAML to them.

Importable without torch and without ray, so that `--help` and a wrong key answer at once.
"""
