"""Text from outside, such as file names and config values, made safe to show."""

import unicodedata

# Control, format and surrogate characters, and line and paragraph separators.
UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def escape_controls(text: str, keep: str = "") -> str:
    """Replace control characters with Python escapes.

    Terminals execute escape sequences, and Unicode format characters such as U+202E change the order of the text.

    Args:
        text: Text to show.
        keep: Control characters that stay, such as newlines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escape(character)
        if character not in keep and unicodedata.category(character) in UNSAFE_CATEGORIES
        else character
        for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
