"""Messages about keys and values on the command line, word for word."""

import pytest

from pipelines.config.command_line import MAX_SHOWN_CHARACTERS, parse_value, show, unknown_key

VALID = ["name", "input.uri", "outputs.topk", "outputs.topp", "outputs.sample.num_rows"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "outputs.topkk",
            "unknown key outputs.topkk in bread.yaml, did you mean outputs.topk? "
            "Valid keys: outputs.topk, outputs.topp, outputs.sample.num_rows",
        ),
        (
            "outputs.zzz.qqq",
            "unknown key outputs.zzz.qqq in bread.yaml. "
            "Valid keys: outputs.topk, outputs.topp, outputs.sample.num_rows",
        ),
        ("zzz", f"unknown key zzz in bread.yaml. Valid keys: {', '.join(VALID)}"),
        ("\x1b[31m", f"unknown key \\x1b[31m in bread.yaml. Valid keys: {', '.join(VALID)}"),
    ],
)
def test_message_for_an_unknown_key_names_the_nearest_and_the_keys_of_its_section(key: str, message: str) -> None:
    assert unknown_key(key, VALID, " in bread.yaml") == message
    assert unknown_key(key, VALID) == message.replace(" in bread.yaml", "")


def test_long_keys_and_values_are_shortened() -> None:
    assert unknown_key("x" * 1000, ["y"]) == f"unknown key {'x' * MAX_SHOWN_CHARACTERS}. Valid keys: y"
    assert show("x" * 1000) == f"'{'x' * (MAX_SHOWN_CHARACTERS - 1)}..."
    assert show("x" * (MAX_SHOWN_CHARACTERS - 2)) == f"'{'x' * (MAX_SHOWN_CHARACTERS - 2)}'"
    assert show(5) == "5"


def test_values_that_hold_secrets_are_masked() -> None:
    assert "secret" not in show("s3://user:secret@bucket/x")
    assert "secret" not in show(["s3://user:secret@bucket/x"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", ["plain"]), ('["a", "b"]', ["a", "b"]), ("[ab]*", ["[ab]*"]), ("[1, 2]", ["[1, 2]"]), ('"a"', ['"a"'])],
)
def test_texts_of_a_list_of_texts(text: str, expected: list[str]) -> None:
    assert parse_value("input.exclude", list[str], [text]) == expected
