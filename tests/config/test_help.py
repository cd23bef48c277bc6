"""The help text of a schema, word for word."""

from typing import Literal

import pytest
from pydantic.fields import FieldInfo

from pipelines.config.base import Section
from pipelines.config.help import describe_default, format_help
from pipelines.config.text import escape_controls


class LimitsConfig(Section):
    """Limits of a bakery."""

    max_loaves: int = 25_000
    """Most loaves in a day."""

    min_loaves: int = 9_999
    num_bakers: int | tuple[int, int] | None = None
    """Bakers. If not set, as many as there are ovens; `N,N` is a range, which the autoscaler keeps as the number of
    customers goes up and down over the day."""


class BreadConfig(Section):
    """Kinds of bread."""

    kind: Literal["rye", "wheat"] = "rye"
    is_sliced: bool = False
    is_fresh: bool = True
    salt: float = 0.0123456
    toppings: list[str] = []
    sizes: list[float] = [1.5, 2]
    prices: dict[str, float] = {}
    limits: LimitsConfig = LimitsConfig()


class BakeryConfig(Section):
    """Bake bread in as many ovens as there are, and sell it to everybody who asks for it until none is left, every day
    but Sunday."""

    name: str
    """Name over the door."""

    password: str | None = None
    bread: BreadConfig = BreadConfig()


class BareConfig(Section):
    num: int = 1


HELP = """\
usage: python -m jobs.bake [--config FILE]... [--section.key VALUE]... [--dry-run]

Bake bread in as many ovens as there are, and sell it to everybody who asks for it until none is
left, every day but Sunday.

  --config FILE    YAML file or pipe with the keys below; may be repeated, and later files take precedence
  --dry-run        print the resolved config and exit
  --help           print this help and exit

  --name TEXT (required)
      Name over the door.
  --password TEXT

bread:
  --bread.kind {rye,wheat} (default: rye)
  --bread.is_sliced true|false (default: false)
  --bread.is_fresh true|false (default: true)
  --bread.salt X (default: 0.01235)
  --bread.toppings TEXT (once for each) (default: none)
  --bread.sizes X[,...] (default: 1.5,2)
  --bread.prices JSON (default: none)

bread.limits:
  --bread.limits.max_loaves N (default: 25_000)
      Most loaves in a day.
  --bread.limits.min_loaves N (default: 9999)
  --bread.limits.num_bakers N or N,N
      Bakers. If not set, as many as there are ovens; N,N is a range, which the autoscaler keeps as
      the number of customers goes up and down over the day."""


def test_help_lists_sections_types_defaults_and_descriptions() -> None:
    assert format_help(BakeryConfig, "jobs.bake") == HELP


def test_help_of_a_schema_without_descriptions() -> None:
    assert format_help(BareConfig, "jobs.bare").splitlines()[2:] == [
        "",
        *HELP.splitlines()[5:8],
        "",
        "  --num N (default: 1)",
    ]


@pytest.mark.parametrize(("value", "text"), [(10_000, "10_000"), (9_999, "9999"), (True, "true"), ((4, 16), "4,16")])
def test_default_is_written_as_on_the_command_line(value: object, text: str) -> None:
    assert describe_default(FieldInfo(default=value)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("émigré", "émigré"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\u202eb", "a\\u202eb"),
        ("a\ud800b", "a\\ud800b"),
        ("two\nlines\tand a tab", "two\nlines\\tand a tab"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert escape_controls(text, keep="\n") == expected
