"""The page of every study key (``docs/keys.md``) and a study with a comment at every key."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import yaml

from securefedcollm.study.keys import Key, about, study_keys

_WIDTH: Final = 100
_ABSENT: Final = object()


def markdown() -> str:
    """``docs/keys.md``: a table for every section."""
    found = study_keys()
    lines = [
        "# Every key of a study",
        "",
        "Look up here what each key of a study file means. *required* says when a key must be",
        "given. You may leave out every other key. `securefedcollm study new` writes a study with",
        "these texts as comments.",
        "",
        "`securefedcollm study keys --markdown` writes this page from the schema. To change a",
        "text, edit `learning.py`, `tuning.py`, `server.py`, `protection.py`, `retrieval.py` or",
        "`config.py` in `securefedcollm/study/`, then run the command again.",
        "",
        *_table([key for key in found if key.depth == 0]),
    ]
    for section in (key for key in found if key.section is not None):
        inside = "[]." if section.kind.startswith("list") else "."
        own = [key for key in found if key.path == f"{section.path}{inside}{key.name}"]
        assert section.section is not None
        lines += [f"## {section.path}", "", about(section.section), "", *_table(own)]
    return "\n".join(lines).rstrip() + "\n"


def _table(keys: Sequence[Key]) -> Iterator[str]:
    yield "| key | type | allowed | default | required | meaning |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for key in keys:
        required = "yes" if key.required else f"if {key.needed}" if key.needed else ""
        if key.section is not None and not key.required:
            default = "none" if key.default is None else "as in its section"
        else:
            default = "" if key.default is None else f"`{_value(key.default)}`"
        if key.default == []:
            default = "`[]`"
        cells = [f"`{key.path}`", key.kind, key.allowed, default, required, key.meaning]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def commented(tree: Mapping[str, Any], head: str) -> str:
    """A study in YAML: the keys of ``tree``, the others commented out, and every meaning.

    Args:
        tree: plain values, only those to be written as they are.
        head: the text at the top, without comment signs.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    shown = [key for key in study_keys() if "[]" not in key.path]
    for _, group in groupby(shown, key=lambda key: key.path.partition(".")[0]):
        lines.append("")
        for key in group:
            lines += _entry(key, _at(tree, key.path))
    return "\n".join(lines) + "\n"


def _entry(key: Key, value: Any) -> list[str]:
    indent = "  " * key.depth
    width = _WIDTH - len(indent) - 2
    text = key.meaning
    words = key.allowed.replace("`", "").split(" or ")
    if key.kind == "word" and any(f"`{word}`" not in text for word in words):
        text += f" One of: {', '.join(words)}."
    lines = [f"{indent}# {line}" for line in textwrap.wrap(text, width, break_on_hyphens=False)]
    sign = "# " if value is _ABSENT else ""
    if key.section is not None and not key.kind.startswith("list"):
        return [*lines, f"{indent}{sign}{key.name}:"]
    shown = key.default if value is _ABSENT else value
    written = "" if shown is None else f" {_value(shown)}"
    return [*lines, f"{indent}{sign}{key.name}:{written}"]


def _at(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return _ABSENT
        node = node[name]
    return node


def _value(value: Any) -> str:
    text: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000)
    return text.strip()[1:-1]
