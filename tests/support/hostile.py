"""Words of another party that would do more than be read, and how to see whether they did."""

from __future__ import annotations

WORDS = (
    "gone [/red] [link=http://evil.example]here[/link] \x1b[2J\x1b]8;;http://evil.example\x1b\\all "
    "well\x1b]8;;\x1b\\\nERROR securefedcollm: forged\r \u202edesrever\u2028 \x9b31m \x00 \x07 "
)
"""Markup, ANSI, OSC 8, line breaks, C1, bidi, NUL, BEL."""
SEEN = ("[/red]", r"\x1b[2J", r"\x1b]8;;http", r"\nERROR", r"\r", r"\u202e", r"\u2028", r"\x9b31m")
"""How they look where they are data."""


def raw_in(text: str) -> list[str]:
    """Characters that are not plain to see, line breaks of the page itself left out."""
    return sorted({c for c in text if not c.isprintable() and c != "\n"})


def assert_harmless(text: str) -> None:
    assert raw_in(text) == []
    assert not any(line.startswith("ERROR securefedcollm: forged") for line in text.split("\n"))
