"""Foreign text is data: what another party wrote, as one printable line of bounded length.

Adversary: a server, silo, study author or bundle maker whose name, reason or path reaches a
terminal, a log, a page or an exception. Raw, it could move the cursor, set the window's title, show
a link that leads elsewhere (OSC 8), reorder what a person reads (bidi), or forge a second line.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.text import Text

MOST: Final = 300
"""Characters of one foreign text: a sentence or two."""
MOST_MESSAGE: Final = 16_384
"""Characters of a whole message, which may quote a reason of each of 128 silos."""
MOST_RECORD: Final = 65_536
"""Characters of one record of a log: a traceback is long."""
_DEEPEST: Final = 64
_MOST_MARKS: Final = 30
"""Non-starters in a row of a stream-safe text."""


def printable(text: object, most: int = MOST) -> str:
    r"""``text`` as one line in which every character shows, at most ``most`` of them.

    Control characters, line breaks, escape sequences, bidi overrides, odd spaces, invisible
    characters and lone surrogates become ``\x1b``, ``\n``, ``\u202e``; what is cut ends in ``…``.
    Applied twice it changes nothing more, so that every place may apply it.
    """
    line = str(text)
    if len(line) <= most and line.isprintable():
        return line
    line = visible(line[: most + 1]).replace("\n", "\\n")
    return line if len(line) <= most else line[: most - 1] + "…"


def visible(text: str) -> str:
    """A whole document with foreign text in it: the same, but of any length, line breaks kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def stream_safe(text: str) -> bool:
    """Whether at most 30 non-starters, accents say, follow each other, also once it is in NFKD.

    That is Unicode's Stream-Safe Text Format (UAX #15, UAX15-D4). Adversary: whoever sends a text
    that takes seconds to bring into one form. Sorting a run takes time with its square.
    """
    if text.isascii():
        return True
    run = 0
    for before, after, only in map(_marks, text):
        if run + before > _MOST_MARKS:
            return False
        run = run + before if only else after
    return True


@lru_cache(maxsize=4096)
def _marks(character: str) -> tuple[int, int, bool]:
    """Of a character in NFKD: non-starters before its first starter, and after its last; and
    whether it has no starter."""
    marks = [unicodedata.combining(c) != 0 for c in unicodedata.normalize("NFKD", character)]
    if all(marks):
        return len(marks), len(marks), True
    return marks.index(False), marks[::-1].index(False), False


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def as_text(*lines: object, most: int = MOST_MESSAGE, style: str = "") -> Text:
    """Printable lines for rich, which looks for no markup in them: ``[/red]`` stays what it is."""
    from rich.text import Text

    return Text("\n".join(printable(line, most) for line in lines), style=style)


class PrintableFormatter(logging.Formatter):
    """Log records in which nothing foreign can move the cursor or forge another record."""

    def format(self, record: logging.LogRecord) -> str:
        # A traceback has many lines: all but the first are indented.
        return visible(super().format(record)[:MOST_RECORD]).replace("\n", "\n    ")


def log_to_stderr(level: int, form: str) -> None:
    """Have every log record of this process from ``level`` on printed on stderr, as data."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(form))
    logging.basicConfig(level=level, handlers=[handler], force=True)


_TOKENS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


def nested_deeper(raw: bytes, most: int = _DEEPEST) -> bool:
    """Whether a JSON text nests lists and objects more than ``most`` deep. Looks before parsing.

    Adversary: whoever wrote it, against parsers that recurse.
    """
    if raw.count(b"[") + raw.count(b"{") <= most:
        return False
    depth = 0
    for token in _TOKENS.finditer(raw):
        match token[0]:
            case b"[" | b"{":
                depth += 1
                if depth > most:
                    return True
            case b"]" | b"}":
                depth -= 1
    return False


def decode_json(raw: bytes | str, most: int = _DEEPEST) -> object:
    """Plain values of a JSON text (bytes: in UTF-8) by somebody else.

    Raises:
        ValueError: it is no JSON, nests too deeply, or repeats a key in an object.
    """
    encoded = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    if nested_deeper(encoded, most):
        raise ValueError(f"nested more than {most} deep")
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    return json.loads(text, object_pairs_hook=_once)


def read_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds anything else.
    """
    found = decode_json(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key is given twice")
    return tree
