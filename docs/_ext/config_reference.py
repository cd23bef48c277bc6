"""Sphinx directive that lists every key of every job, from the pydantic schemas that the jobs themselves use.

`config_markdown` needs nothing but the schemas, so a test can call it without Sphinx.
"""

import importlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.config.base import leaf_fields, required_leaves
from pipelines.config.help import describe_default, describe_type

# Before the others, which follow in alphabetical order.
MAIN_JOBS = ("infer", "train", "evaluate")
JOBS_FOLDER = Path(__file__).resolve().parents[2] / "jobs"


def job_names() -> list[str]:
    """Return the names of all jobs, the main ones first."""
    found = {path.stem for path in JOBS_FOLDER.glob("*.py")} - {"__init__"}
    return [*MAIN_JOBS, *sorted(found.difference(MAIN_JOBS))]


def schema_of(job: str) -> type[BaseModel]:
    """Return the schema of a job: `InferConfig` of `pipelines.config.infer` for `infer`."""
    module = importlib.import_module(f"pipelines.config.{job}")
    schema: type[BaseModel] = getattr(module, "".join(map(str.capitalize, job.split("_"))) + "Config")
    return schema


def config_markdown(job: str) -> str:
    """Return the keys of a job in Markdown: a heading for the job, then one table for each section."""
    schema = schema_of(job)
    required = set(required_leaves(schema))
    lines = [f"## {job}", "", _one_line(schema.__doc__), "", f"`python -m jobs.{job} --help` prints the same list.", ""]
    for section, keys in groupby(leaf_fields(schema).items(), key=lambda item: item[0].rpartition(".")[0]):
        # One heading text may occur in several jobs, so the anchor names the job.
        lines += [f"({job}-{section.replace('.', '-') or 'keys'})=", f"### `{section}`" if section else "### Keys", ""]
        lines += ["| key | type | default | description |", "| --- | --- | --- | --- |"]
        lines += [_row(key, field, is_required=key in required) for key, field in keys]
        lines.append("")
    return "\n".join(lines)


def _row(key: str, field: FieldInfo, is_required: bool) -> str:
    default = describe_default(field)
    cells = (
        f"`{key}`",
        f"`{describe_type(field.annotation)}`",
        "required" if is_required else f"`{default}`" if default else "not set",
        _one_line(field.description),
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def setup(app: Any) -> dict[str, bool]:
    """Register the directive `config-reference`, which takes no arguments and renders all jobs."""
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    class ConfigReference(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # the schemas may have changed since the last build
            return list(self._sections())

        def _sections(self) -> Iterator[nodes.Node]:
            for job in job_names():
                yield from self.parse_text_to_nodes(config_markdown(job), allow_section_headings=True)

    app.add_directive("config-reference", ConfigReference)
    return {"parallel_read_safe": True}
